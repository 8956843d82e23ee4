"""Speed of an answer that is written and spoken, one at a time and greedily, against `generate` of ``transformers``.

Both sides have the same random Qwen3-Omni with 16 codebooks, a predictor of five layers and the released hop of
Code2Wav, in fp32, and give the same codes. Theirs writes the whole text, then speaks all of it, then makes the sound;
ours does the three side by side, so its first sound comes while it writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.sides import processes, take_turns
from omni_train import platform
from omni_train.recipe.schema import ParallelConfig, Positions
from omni_train.threads import keep_awake
from tests.support.conversations import ROLES, Conversation, qwen3_omni, randomized
from tests.support.omni_answers import answer_of_reference, answering

TOKENS, FRAMES, REPEATS = 24, 75, 3
FRAME_SECONDS = 0.08
CODEBOOKS, CODEWORDS = 16, 256


@functools.cache
def question() -> Conversation:
    """Half a hundred positions of text and sound."""
    return Conversation(Positions.qwen3_omni, 3).turn("user").text(17).sound(203).turn("assistant")


def original():
    """A random model, whose speech does not end by itself."""
    import transformers

    config = qwen3_omni().config
    wide = dict(hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    talker, code2wav = config.talker_config, config.code2wav_config
    text, predictor = talker.text_config, talker.code_predictor_config
    for part, sizes in (
        (text, wide | dict(vocab_size=2 * CODEWORDS, moe_intermediate_size=128, shared_expert_intermediate_size=256)),
        (predictor, wide | dict(vocab_size=CODEWORDS, intermediate_size=768, num_hidden_layers=5)),
        (predictor, dict(num_code_groups=CODEBOOKS, layer_types=["full_attention"] * 5)),
        (talker, dict(num_code_groups=CODEBOOKS)),
        (code2wav, dict(num_quantizers=CODEBOOKS, codebook_size=CODEWORDS, decoder_dim=96)),
        (code2wav, dict(upsample_rates=[8, 5, 4, 3], upsampling_ratios=[2, 2])),
    ):
        for name, value in sizes.items():
            setattr(part, name, value)
    text.rope_parameters["mrope_section"] = [12, 10, 10]
    controls = ("eos_token", "pad", "bos", "nothink", "think_bos", "think_eos")
    for index, name in enumerate(controls):
        setattr(talker, f"codec_{name}_id", CODEWORDS + index)
    talker.speaker_id = {name: CODEWORDS + len(controls) + index for index, name in enumerate(talker.speaker_id)}
    model = randomized(transformers.Qwen3OmniMoeForConditionalGeneration, type(config)(**config.to_dict()))
    with torch.no_grad():
        model.thinker.lm_head.weight[ROLES["system"] :] = 0  # no mark is the likeliest word
        model.talker.codec_head.weight[talker.codec_eos_token_id] = 0
    return model


def theirs(folder: Path) -> Callable[[str], float]:
    """Answer of the reference -> sum of its codes."""
    model, codes = original(), []
    model.save_pretrained(folder / "whole")
    model.code2wav.register_forward_pre_hook(lambda _module, arguments: codes.append(arguments[0]))

    def step(_kind: str) -> float:
        with torch.no_grad():
            answer_of_reference(model, question(), TOKENS, FRAMES, 1.05)
        return float(codes.pop().sum())

    return step


def ours(folder: Path) -> Callable[[str], float]:
    """Our answer, or its beginning up to the ``first sound`` -> sum of its codes."""
    platform.init_distributed()
    answer = answering(folder / "whole", folder, ParallelConfig())

    def step(kind: str) -> float:
        spoken, _ = answer(question(), TOKENS, FRAMES, 1.05)
        for event in spoken:
            if kind == "first sound" and event.waveform is not None:
                break
        return float(spoken.speaker.speech[0].frames().sum())

    return step


def run(threads: int = 2) -> list[dict]:
    """Rows of name, value and unit."""
    keep_awake()
    turns = [("transformers", "whole answer"), ("omni_train", "whole answer"), ("omni_train", "first sound")]
    with processes({"transformers": theirs, "omni_train": ours}, threads) as connections:
        (reference, whole, first), rounds = take_turns(connections, turns, REPEATS)
    if any(codes[0] != codes[1] for codes in rounds):
        raise RuntimeError(f"the sides do not speak the same codes: {rounds}")
    name, sound = f"an answer of {TOKENS} tokens and {FRAMES} frames", FRAMES * FRAME_SECONDS
    rows = [
        (f"{name}, {side}", FRAMES / s, "frames/s") for (side, _), s in zip(turns, (reference, whole), strict=False)
    ]
    rows += [
        (f"{name}, {side}, real-time factor", s / sound, "")
        for (side, _), s in zip(turns, (reference, whole), strict=False)
    ]
    rows += [(f"{name}, ratio", reference / whole, "×")]
    rows += [(f"{name}, first sound, transformers", reference, "s"), (f"{name}, first sound, omni_train", first, "s")]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in rows]
