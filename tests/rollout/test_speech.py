"""Speech that is generated step by step has the log-probabilities of the parallel pass, and follows its text."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import IGNORE
from omni_train.data.rows.sequences import TokenSequence
from omni_train.recipe.schema import (
    ParallelConfig,
    ScheduleKind,
    SpeechScheduleConfig,
    States,
    TalkerStyle,
)
from tests.support.talker import CODEBOOKS, CODEWORDS, FakeTokenizer, small_talker

SCHEDULES = {
    "tightest": SpeechScheduleConfig(ScheduleKind.tightest),
    "lead": SpeechScheduleConfig(ScheduleKind.lead, lead=3),
    "turns": SpeechScheduleConfig(ScheduleKind.turns, text=3, frames=2),
    "text_first": SpeechScheduleConfig(ScheduleKind.text_first),
}
LENGTHS = [(7, 19), (1, 6), (5, 5), (4, 0), (6, 11)]
"""Text tokens and frames of the sequences."""


def samples(recipe, seed=5):
    """Planned sequences, with the prompt, text and codes of each."""
    from omni_train.data.rows.speech import SpeechSequence
    from omni_train.data.rows.speech_plans import Planner, joined

    random = np.random.default_rng(seed)
    planner = Planner(recipe.model.talker, FakeTokenizer(), recipe.data.speech.switch_label)
    dual = recipe.model.talker.style is TalkerStyle.dual_track
    found = []
    for number, (tokens, frames) in enumerate(LENGTHS):
        if dual:
            tokens, frames = min(tokens, max(frames, 1)), max(frames, 1)
        text = random.integers(0, 90, tokens).tolist()
        codes = random.integers(0, CODEWORDS, (CODEBOOKS, frames))
        context = [planner.text(random.integers(0, 90, 4)), planner.states(0, 2 + number)]
        if dual:
            plan = joined([*context, planner.dual_track(text, codes, 20)])
            prompt = joined([*context, planner.dual_track_head(text[0], 20)])
        else:
            reference = random.integers(0, CODEWORDS, (CODEBOOKS, 3))
            before = [
                *planner.voice("a voice" if number % 2 else None, reference),
                *context,
                planner.interleaved_head(),
            ]
            plan = joined([*before, planner.interleaved(text, codes, recipe.data.speech.schedules[0])])
            prompt = joined(before)
        thinker = TokenSequence(np.zeros(2 + number, np.int32), np.full(2 + number, IGNORE, np.int32))
        draws = np.zeros(len(plan), np.float32)
        states = random.standard_normal((2 + number, 48)).astype(np.float32)
        found.append((SpeechSequence(plan, None, draws, thinker, np.arange(2 + number), states), prompt, text, codes))
    return found


def log_probs(rank, world_size, recipe):
    """Log-probabilities of each sequence's frames: of the parallel pass over all, over each alone, and of the steps."""
    from omni_train import platform
    from omni_train.data.rows.schedules import drawable
    from omni_train.data.rows.speech_packing import pack_speech
    from omni_train.models.talker import build_chunks
    from omni_train.models.talker.row import LocalSpeechRow
    from omni_train.rollout.speech import Prompt, Speaker, speak

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    (model,) = build_chunks(recipe)
    model.eval()
    planned, talker = samples(recipe), recipe.model.talker
    masks = [drawable(talker, recipe.data.speech.switch_label, text_ended=ended) for ended in (False, True)]

    def parallel(sequences):
        length = sum(-(-len(one) // 8) * 8 for one in sequences) + 16
        row = pack_speech(
            [replace(one, thinker=None) for one in sequences],
            row_tokens=0,
            speech_row_tokens=length,
            alignment=8,
            padding_token=0,
        )
        local = LocalSpeechRow.from_batch(row)
        with torch.no_grad():
            hidden = model(local)[:, 0]
            if recipe.parallel.tensor > 1:
                from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

                hidden = gather_from_sequence_parallel_region(hidden)
            mask = torch.from_numpy(np.stack([masks[int(ended)] for ended in row.text_ended]))
            first = model.codec_head(hidden).masked_fill(~mask, -torch.inf).log_softmax(-1)
            out, start = [], 0
            for sequence in sequences:
                own, label_codes = np.arange(start, start + len(sequence)), row.label_codes
                speaks = [u for u in own if int(row.label_codes[u, 0]) != IGNORE]
                values = []
                for u in speaks:
                    c0 = row.speech_labels[u]
                    losses = model.code_predictor.losses(
                        hidden[u][None], model.codec_embedding(c0[None]), label_codes[u][None], chunk_tokens=64
                    )
                    values.append(float(first[u, c0]) - float(losses.sum()))
                end = [u for u in own if int(row.speech_labels[u]) == talker.codec_eos_id][-1]
                out.append([*values, float(first[end, talker.codec_eos_id])])
                start += -(-len(sequence) // 8) * 8
        return out

    together = parallel([one for one, *_ in planned])
    alone = [parallel([one])[0] for one, *_ in planned]
    stepped = []
    for group in (range(len(planned)),) if recipe.parallel.tensor > 1 else ([0, 2, 4], [1], [3]):
        chosen = [planned[index] for index in group]
        ratios = [Fraction(codes.shape[1], max(len(text), 1)) for _, _, text, codes in chosen]
        speaker = Speaker(
            model,
            FakeTokenizer(),
            [Prompt(prompt, None, torch.from_numpy(one.states), text) for one, prompt, text, _ in chosen],
            schedule=recipe.data.speech.schedules[0],
            switch_label=recipe.data.speech.switch_label,
            frames_per_token=ratios[0],
            forced=[codes for *_, codes in chosen],
        )
        for feeder, ratio in zip(speaker._feeders, ratios, strict=False):
            feeder.ratio = ratio
        for _ in speak(speaker):
            pass
        stepped += zip(group, [speech.log_probs for speech in speaker.speech], strict=True)
    platform.parallel.destroy()
    return together, alone, [values for _, values in sorted(stepped)]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", [*SCHEDULES, "dual_track"])
def test_stepwise_log_probabilities_are_those_of_the_parallel_pass(distributed, name, tensor):
    """Packed among others and alone, over the boundaries of chunks of text, for every schedule."""
    if tensor == 2 and name not in ("turns", "dual_track"):
        pytest.skip("one schedule of each style shows it")
    recipe = small_talker(ParallelConfig(tensor=tensor), states=States.stored)
    if name == "dual_track":
        recipe.model.talker.style = TalkerStyle.dual_track
    else:
        recipe.data.speech.schedules = [SCHEDULES[name]]
    for together, alone, stepped in distributed(tensor, log_probs, recipe):
        for packed, single, steps, (_, frames) in zip(together, alone, stepped, LENGTHS, strict=True):
            assert len(steps) == (max(frames, 1) if name == "dual_track" else frames) + 1
            np.testing.assert_allclose(packed, single, rtol=0, atol=1e-4)
            np.testing.assert_allclose(steps, packed, rtol=0, atol=1e-4)
            assert np.std(steps) > 0 or len(steps) == 1
