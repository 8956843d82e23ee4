"""Answers that a whole Qwen3-Omni of transformers speaks with forced codes, and the rows that are the same for us.

Axis letters: n positions of the Talker, V codec vocabulary, Q codebooks, M frames, K codewords, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import SpeechSequence, dual_track_ids
from omni_train.data.rows.speech_context import Context
from omni_train.data.rows.speech_packing import pack_speech
from omni_train.data.rows.speech_plans import CONTEXT, Planner, joined
from omni_train.interop.talker_config import talker_from_hugging_face
from omni_train.recipe.schema import DataConfig, MediaConfig, Positions, SourceConfig, TalkerTrainingConfig
from tests.support.conversations import (
    AUDIO,
    IM_END,
    IM_START,
    IMAGE,
    LINE_END,
    ROLES,
    TTS_BOS,
    TTS_EOS,
    TTS_PAD,
    VIDEO,
    Conversation,
)
from tests.support.talker import small_talker

SPEAKER = "anna"


@dataclass
class Spoken:
    """An answer, and all that is computed while it is spoken."""

    text: list[int]  # its tokens
    codes: np.ndarray  # (Q, M)
    embeddings: torch.Tensor  # (n, H) that enter the Talker
    positions: torch.Tensor  # (3, n)
    logits: torch.Tensor  # (n, V) of codebook 0
    residual_logits: torch.Tensor  # (M, Q − 1, K)


class Words:
    """Tokenizer of the small Qwen3-Omni, as far as plans need it."""

    im_start, im_end = IM_START, IM_END

    def encode(self, text: str) -> list[int]:
        return [ROLES.get(word) or {"": LINE_END}[word] for word in text.split("\n")] if text != "\n" else [LINE_END]

    def token_id(self, name: str) -> int:
        return {"<tts_pad>": TTS_PAD, "<tts_text_bos>": TTS_BOS, "<tts_text_eod>": TTS_EOS}[name]


def forcing(script: list[int]):
    """Processor of logits that makes a generation follow a script."""
    import transformers

    coming = iter(script)

    class Forcing(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, next(coming)] = 0
            return forced

    return transformers.LogitsProcessorList([Forcing()])


@torch.no_grad()
def speak(model, conversation: Conversation, tokens: int, frames: int, seed: int) -> Spoken:
    """An answer of random tokens in random codes, by transformers' own `generate`; one more token ends it unread."""
    talker, predictor = model.talker, model.talker.code_predictor
    # Its get_rope_index asks for this, where there is sound beside images or video, and no released folder has it.
    talker.config.audio_config = model.config.thinker_config.audio_config
    config = talker.config
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_code_groups, frames)
    codes = torch.randint(config.code_predictor_config.vocab_size, shape, generator=generator).numpy()
    text = torch.randint(ROLES["system"], (tokens,), generator=generator).tolist()
    inputs: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    residual: list[torch.Tensor] = []
    residual_scripts = iter(codes[1:].T.tolist())

    def keep_input(_module, _arguments, keywords):
        inputs.append(keywords["inputs_embeds"][0])
        positions.append(keywords["position_ids"][-3:, 0].float())

    hooks = [
        talker.model.register_forward_pre_hook(keep_input, with_kwargs=True),
        talker.codec_head.register_forward_hook(lambda _module, _arguments, out: logits.append(out[0])),
        *(
            head.register_forward_hook(lambda _module, _arguments, out: residual.append(out[0, -1]))
            for head in predictor.lm_head
        ),
    ]
    generate = predictor.generate

    def forced(**keywords):
        return generate(**keywords, logits_processor=forcing(next(residual_scripts)))

    with patch.object(predictor, "generate", forced):
        model.generate(
            **conversation.inputs(),
            speaker=SPEAKER,
            use_audio_in_video=conversation.sound_in_video,
            talker_use_audio_in_video=conversation.sound_in_video,  # or its rotary ids take such a video for sound
            thinker_max_new_tokens=tokens + 1,
            thinker_logits_processor=forcing([*text, IM_END]),
            talker_max_new_tokens=frames + 1,
            talker_do_sample=False,
            talker_logits_processor=forcing([*codes[0].tolist(), config.codec_eos_token_id]),
        )
    for hook in hooks:
        hook.remove()
    return Spoken(
        text=text,
        codes=codes,
        embeddings=torch.cat(inputs),
        positions=torch.cat(positions, dim=1),
        logits=torch.cat(logits),
        residual_logits=torch.stack(residual).unflatten(0, (frames, -1)),
    )


def sequence_of(conversation: Conversation, spoken: Spoken, planner: Planner) -> SpeechSequence:
    """The same answer as a sequence of ours: the user's turns whole, and the answer's plan of `dual_track`."""
    tokens, ids = conversation.tokens_and_ids()
    media = (tokens == AUDIO) | (tokens == IMAGE) | (tokens == VIDEO)
    plans, runs, read = [], [], []
    turns = [*conversation.turns, ("", conversation.length, len(conversation.runs))]
    for (role, token, run), (_, next_token, next_run) in pairwise(turns):
        if role != "user":
            continue
        span = torch.arange(token, next_token)
        plan = planner.text(tokens[span].numpy())
        reading = media[span].numpy()
        plan.text_ids[reading], plan.kinds[reading] = -1, CONTEXT
        plan.sources[reading] = sum(map(len, read)) + np.arange(reading.sum())
        plans.append(plan)
        runs += conversation.runs[run:next_run]
        read.append(span[media[span]].numpy())
    speaker = planner.talker.speaker_ids[SPEAKER]
    plan = joined([*plans, planner.dual_track(spoken.text, spoken.codes, speaker)])
    data = DataConfig(name="", path="", tokenizer="", sources=[SourceConfig(path="")], row_tokens=8)
    data.media = MediaConfig(positions=Positions.qwen3_omni)
    thinker = TokenSequence(
        tokens.int().numpy(),
        np.full(len(tokens), IGNORE, np.int32),
        positions=ids.numpy(),
        mel=[clip.numpy() for clip in conversation.clips],
        audio_slots=np.flatnonzero(tokens == AUDIO),
        patches=[patch.numpy() for patch in conversation.patches],
        grids=conversation.grids,
        vision_slots=np.flatnonzero((tokens == IMAGE) | (tokens == VIDEO)),
    )
    return SpeechSequence(
        plan,
        dual_track_ids(Context(plans, runs), len(plan), data),
        np.zeros(len(plan), np.float32),
        thinker,
        np.concatenate(read),
    )


def speech_row(
    model, conversations: list[Conversation], answers: list[Spoken], row_tokens: int, speech_row_tokens: int
) -> SpeechRow:
    """A row of answers."""
    talker = talker_from_hugging_face(model.config.to_dict(), "").talker
    planner = Planner(talker, Words())
    pairs = zip(conversations, answers, strict=True)
    return pack_speech(
        [sequence_of(conversation, spoken, planner) for conversation, spoken in pairs],
        row_tokens=row_tokens,
        speech_row_tokens=speech_row_tokens,
        alignment=8,
        padding_token=0,
        float_positions=True,
    )


def import_and_speak(rank, world_size, hf, folder, parallel, row: SpeechRow):
    """Import; what enters the Talker (first stage), logits of codebook 0 and of the residual codes, and the Thinker's
    states at all tokens of its row."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.interop.convert import import_checkpoint
    from omni_train.recipe.networks import held
    from omni_train.training.engines.megatron import MegatronEngine

    paths = {"checkpoint": folder / "thinker", "talker": folder / "talker"}
    import_checkpoint("qwen3_omni_moe", Path(hf), parallel=parallel, **paths)
    recipe = small_talker(parallel, row_tokens=len(row.tokens))
    thinker, talker = (read_model_config(resolve(paths[name])) for name in ("checkpoint", "talker"))
    recipe.model.talker, recipe.model.vocab_size = talker.talker, talker.vocab_size
    recipe.model.audio, recipe.model.vision = thinker.audio, thinker.vision
    recipe.data.speech.row_tokens, recipe.data.media.positions = len(row.text_ids), Positions.qwen3_omni
    recipe.talker_training = TalkerTrainingConfig(thinker=str(paths["checkpoint"]))
    platform.parallel.initialize(parallel, 1)
    engine = MegatronEngine(recipe)
    load_model(engine.chunks, resolve(paths["talker"]), held(recipe))
    stage, embeddings = engine.network(), []

    def whole(hidden):
        return gather_from_sequence_parallel_region(hidden, group=stage.tp_group)[:, 0]

    if stage.pre_process:
        embed = stage.embed
        stage.embed = lambda local: embeddings.append(embed(local)) or embeddings[-1]

    def read(stage, hidden, local):
        hidden_UH = whole(hidden)
        predicting = (row.label_codes[:, 0] != IGNORE).nonzero().squeeze(1)
        first = stage.codec_embedding(row.speech_labels[predicting])
        hidden_MGP = stage.code_predictor.hidden(hidden_UH[predicting], first, row.label_codes[predicting])
        residual = torch.einsum("mgp,gkp->mgk", hidden_MGP, stage.code_predictor.heads)
        return {"logits": stage.codec_head(hidden_UH), "residual": residual}

    (prepared,) = engine.prepared([row])
    (found,) = engine.forward([stage], [prepared], read)
    found["embeddings"] = whole(embeddings[0]) if embeddings else None
    row.prepared, row.context = {}, (~row.padding).nonzero().squeeze(1)
    (found["states"],) = engine.frozen["thinker"].states(engine, [row])
    platform.parallel.destroy()
    return found
