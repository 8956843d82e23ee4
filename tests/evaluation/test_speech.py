"""Held-out texts that a Talker speaks: measured exactly, cut short by a signal, refused by name."""

from __future__ import annotations

import functools
import signal
from collections import Counter

import numpy as np
import pytest
import soundfile

from omni_train.data.rows.sequences import TokenSequence
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import (
    EvaluationConfig,
    ParallelConfig,
    ScheduleKind,
    SpeechScheduleConfig,
    States,
    TalkerStyle,
)
from omni_train.recipe.validate import validate
from tests.distributed.test_talker_layouts import save_thinker
from tests.support.talker import CODEBOOKS, CODEWORDS, FakeTokenizer, small_talker

FRAME = 1920
TURNS = SpeechScheduleConfig(ScheduleKind.turns, text=3, frames=2)
LENGTHS = [(7, 19), (2, 6), (5, 13), (4, 30), (6, 70)]
"""Text tokens of the prompts, and frames of their recordings: of each class of lengths but the longest."""
TEXTS = ["seven words are said here by her", "two words", "one two three four five", "eins zwei drei vier", "a b c"]


def recipe_of(tmp_path, style=TalkerStyle.interleaved, parallel=None, **evaluation):
    recipe = small_talker(parallel or ParallelConfig(), states=States.stored, style=style)
    recipe.runs_dir, recipe.data.tokenizer = str(tmp_path), "unused"
    recipe.data.speech.schedules = [TURNS]
    recipe.evaluation = EvaluationConfig(every=1, **dict(print_samples=2) | evaluation)
    return recipe


def prompts_of(recipe):
    from omni_train.data.rows.speech_plans import Planner, joined
    from omni_train.data.rows.spoken_prompts import SpokenPrompt

    planner = Planner(recipe.model.talker, FakeTokenizer(), recipe.data.speech.switch_label)
    random, found = np.random.default_rng(11), []
    for number, ((tokens, frames), text) in enumerate(zip(LENGTHS, TEXTS, strict=True)):
        said = random.integers(0, 90, tokens).tolist()
        context = [planner.text(random.integers(0, 90, 4)), planner.states(0, 2 + number)]
        dual = recipe.model.talker.style is TalkerStyle.dual_track
        head = planner.dual_track_head(said[0], 20) if dual else planner.interleaved_head()
        codes = random.integers(0, CODEWORDS, (CODEBOOKS, frames))
        codes[0, 0] = number  # by which the fakes below know it
        meta = {"language": "de" if number == 3 else "en", "voice": "AB"[number % 2]}
        states = random.standard_normal((2 + number, 48)).astype(np.float32)
        positions = np.arange(2 + number)
        thinker = TokenSequence(np.zeros(2 + number, np.int32), np.zeros(2 + number, np.int32)) if number == 1 else None
        prompt = SpokenPrompt(
            f"s/{number}",
            text,
            meta,
            joined([*context, head]),
            None,
            said,
            codes,
            np.full(frames * FRAME, 0.1, np.float32),
            codes[:, :3] if number != 2 else None,
            thinker,
            positions,
            None if number == 1 else states,
        )
        found.append(prompt)
    return found


def decode(codes: np.ndarray) -> np.ndarray:
    """Each frame is a step as high as its codes are on average, and loud."""
    return np.repeat(0.5 + codes.mean(0) / 22, FRAME).astype(np.float32)


def transcribe(waveforms):
    """Hears by the length alone what is said: all but a word of the third text, and of soft recordings the last."""
    found = []
    for waveform in waveforms:
        frames = round(len(waveform) / (FRAME * 2 / 3))
        text = next((text for text, (_, known) in zip(TEXTS, LENGTHS, strict=True) if known == frames), "")
        text = text.replace("three", "")
        found.append(text if abs(waveform).max(initial=0) > 0.3 else text.rpartition(" ")[0])
    return found


def voice_of(waveform, rate):
    """An embedding that tells by how loud the first frame is, of which the codes of the prompts differ."""
    angle = waveform[0] * 1.5 if len(waveform) else 0.0
    return np.array([np.cos(angle), np.sin(angle)])


class Thinker:
    """Tells which positions were asked for."""

    def states_of(self, sequence, positions):
        import torch

        assert len(sequence) == len(positions) == 3
        return torch.ones(3, 48)


def evaluated(rank, world_size, recipe, forced=False, stop=None):
    from omni_train import platform, stopping
    from omni_train.evaluation import speech, voices
    from omni_train.evaluation.speech_measures import Pauses
    from omni_train.models.talker import build_chunks

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    (model,) = build_chunks(recipe)
    model.train()
    every = prompts_of(recipe)
    by_number = {speech.zlib.crc32(prompt.name.encode()): prompt.codes for prompt in every}
    speaker = speech.Speaker

    def forcing(model, tokenizer, prompts, **settings):
        codes = [by_number[prompt.number] for prompt in prompts]
        return speaker(model, tokenizer, prompts, **settings, forced=codes if forced else None)

    refused = Counter(no_codes=int(platform.parallel.data_rank() == 0))
    share = every[platform.parallel.data_rank() :: platform.parallel.data_world_size()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "Tokenizer", lambda folder: FakeTokenizer())
        patch.setattr(speech, "Speaker", forcing)
        patch.setattr(voices, "speaker_embedding", voice_of)
        patch.setattr(voices, "pauses", lambda waveform, rate: Pauses(2, 0.25))
        patch.setattr(voices, "require_packages", lambda measures: None)
        result = speech.SpokenTexts(recipe, share, refused, decode, transcribe, Thinker())
        if stop is not None:
            patch.setattr(stopping, "asked", functools.partial(next, stop_after(stop)))
        again = result(model), result(model)
    assert model.training
    platform.parallel.destroy()
    return [(one.metrics, one.exhibits) for one in again]


def stop_after(calls):
    for _ in range(calls):
        yield None
    while True:
        yield signal.SIGTERM


def test_speech_of_the_recordings_codes_is_measured_as_their_resynthesis(distributed, tmp_path):
    recipe = recipe_of(tmp_path)
    (((metrics, kept), (again, _)),) = distributed(1, evaluated, recipe, True)
    assert metrics == again
    references = {number: one.reference for number, one in enumerate(prompts_of(recipe)) if one.reference is not None}
    near = {number: np.cos(1.5 * (decode(codes)[0] - 0.1)) for number, codes in references.items()}
    right = [value > np.mean([near[other] for other in near if (other - number) % 2]) for number, value in near.items()]
    assert 0 < np.mean(right) < 1
    wanted = dict(spoken=5, skipped_no_codes=1, ended_eos=1, ended_limit=0, ended_stuck=0)
    wanted |= dict(length_ratio=1, length_within_25=1, tokens_before_sound=14 / 5, positions_before_sound=3)
    wanted |= dict(pauses=2, longest_pause=0.25, original_pauses=2, original_longest_pause=0.25)
    wanted |= dict(similarity=1, right_voice=1)
    wanted |= dict(original_similarity=np.mean([*near.values()]), original_right_voice=np.mean(right))
    for side, missed in (("original", 1), ("resynthesis", 0), ("speech", 0)):
        wanted |= {f"{side}_wer": (5 * missed + 1) / 21, f"{side}_wer_en": (4 * missed + 1) / 17}
        wanted |= {f"{side}_wer_de": missed / 4, f"{side}_wer_below_1s": missed / 2}
        wanted |= {f"{side}_wer_below_2s": (2 * missed + 1) / 12, f"{side}_wer_below_15s": missed / 3}
    assert {name: metrics[f"eval_{name}"] for name in wanted} == pytest.approx(wanted)
    rest = {name for name in metrics if name.removeprefix("eval_") not in wanted}
    assert all("_cer" in name or "_below_5s" in name for name in rest)
    assert len(kept) == 2
    for number, one in enumerate(kept):
        sounds = {name: soundfile.read(getattr(one, name))[0] for name in ("original", "resynthesis", "speech")}
        assert all(len(sound) == LENGTHS[number][1] * FRAME for sound in sounds.values())
        np.testing.assert_array_equal(sounds["speech"], sounds["resynthesis"])
        np.testing.assert_allclose(sounds["original"], 0.1, atol=1e-4)
        assert one.spectrograms.stat().st_size > 0
        assert one.cells()["text"] == TEXTS[number]


def test_ranks_share_the_texts_and_speak_as_one_does(distributed, tmp_path):
    schedules = [TURNS, SpeechScheduleConfig(ScheduleKind.lead, lead=2)]
    (((alone, _), _),) = distributed(1, evaluated, recipe_of(tmp_path / "1", speech_schedules=schedules))
    found = distributed(2, evaluated, recipe_of(tmp_path / "2", speech_schedules=schedules))
    for (metrics, _), _ in found:
        assert metrics == pytest.approx(alone, rel=1e-6)
    assert [len(kept) for (_, kept), _ in found] == [4, 0]
    assert alone["eval_length_ratio_turns_3_2"] != alone["eval_length_ratio_lead_2"]
    assert alone["eval_positions_before_sound_lead_2"] == 3
    assert "eval_length_ratio" not in alone
    assert alone["eval_original_wer"] == pytest.approx(6 / 21)


def test_tensor_parallel_ranks_say_the_same(distributed, tmp_path):
    first, second = distributed(2, evaluated, recipe_of(tmp_path, parallel=ParallelConfig(tensor=2)))
    assert first[0][0] == first[1][0] == second[0][0]
    assert first[0][0]["eval_spoken"] == 5


def test_dual_track_speaks_after_its_first_token(distributed, tmp_path):
    recipe = recipe_of(tmp_path, TalkerStyle.dual_track, speech_temperature=0.0)
    (((metrics, _), (again, _)),) = distributed(1, evaluated, recipe)
    assert metrics == again
    assert (metrics["eval_tokens_before_sound"], metrics["eval_positions_before_sound"]) == (1, 0)
    assert sum(metrics[f"eval_ended_{ending}"] for ending in ("eos", "limit", "stuck")) == 1


@pytest.mark.parametrize("calls", [0, 30])
def test_a_signal_cuts_it_short_and_nothing_is_reported(distributed, tmp_path, calls):
    for one in distributed(1, evaluated, recipe_of(tmp_path), False, calls)[0]:
        assert one == ({}, ())
    assert not list(tmp_path.iterdir())


def _ids(length):
    return np.arange(length) + np.array([[0], [3], [7]])


def states(rank, world_size, folder, parallel):
    """States of a sequence among others in a row of the engine, and of it alone."""
    import torch

    from omni_train import platform
    from omni_train.data.rows.packing import pack
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_talker(parallel)
    recipe.talker_training.thinker = str(folder)
    recipe.data.alignment = 9
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    random = np.random.default_rng(3)
    first, second = (
        TokenSequence(
            random.integers(0, 90, n), np.full(n, -100), positions=np.arange(n) + random.integers(9, size=(3, 1))
        )
        for n in (31, 22)
    )
    row = pack([first, second], row_tokens=96, alignment=8, padding_token=0)
    positions = np.array([21, 0, 5, 13])
    row.context = torch.from_numpy(positions + 32)
    (among_others,) = engine.frozen["thinker"].states(engine, [row])
    alone = engine.frozen["thinker"].states_of(second, positions)
    platform.parallel.destroy()
    return among_others, alone


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_thinkers_states_are_those_of_training(distributed, tmp_path, tensor):
    distributed(1, save_thinker, tmp_path)
    for among_others, alone in distributed(tensor, states, tmp_path, ParallelConfig(tensor=tensor)):
        assert alone.shape == (4, 48)
        np.testing.assert_allclose(alone, among_others, atol=2e-5)


TALKER = "stage=talker_general model=tiny data.codec=c talker_training.thinker=t evaluation.every=5"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (TALKER, "evaluation.every=5: speaks held-out texts; name the codec that makes them sound by evaluation.codec"),
        (
            f"{TALKER} evaluation.codec=c parallel.expert=2",
            "parallel.expert=2: evaluation.every=5 speaks, for which experts must not be divided; set one of the two",
        ),
        (f"{TALKER} evaluation.codec=c parallel.context=2", "parallel.context=2: evaluation.every=5 generates"),
        (
            f"{TALKER} evaluation.codec=c evaluation.speech_schedules=[{{kind:lead}},{{kind:lead,weight:2}}]",
            "evaluation.speech_schedules=lead_8: is named twice; leave one out",
        ),
        (
            f"{TALKER} model.talker.style=dual_track evaluation.speech_schedules=[{{kind:lead}}]",
            "evaluation.speech_schedules=1: model.talker.style=dual_track has one order; leave them out",
        ),
        (f"{TALKER} evaluation.speech_temperature=-1", "evaluation.speech_temperature=-1.0: must be at least 0"),
    ],
)
def test_refusals(words, line):
    with pytest.raises(UserError) as refused:
        validate(load_recipe(words.split()), world_size=None)
    assert line in str(refused.value)
