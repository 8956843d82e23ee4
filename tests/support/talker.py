"""Small Talkers above small Thinkers, and rows for them, without files or Hydra."""

from __future__ import annotations

from dataclasses import fields

import torch

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.recipe.schema import (
    Code2WavConfig,
    CodePredictorConfig,
    ParallelConfig,
    Recipe,
    SpeechConfig,
    States,
    TalkerConfig,
    TalkerTrainingConfig,
)
from tests.support.thinker import VOCAB, add_media, encoders, random_row, small_recipe

CODEBOOKS, CODEWORDS = 5, 11
_TALKER = {entry.name for entry in fields(TalkerConfig)}


def small_talker(
    parallel: ParallelConfig | None = None, *, states: States = States.live, row_tokens=96, **changes
) -> Recipe:
    """A recipe of a Talker with every kind of layer above the Thinker of `small_recipe(**encoders())`.

    `changes` are fields of the Talker's configuration, of the model's, or of the recipe.
    """
    talker = dict(
        hidden_size=40,
        pattern="GE*E",
        repeats=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        partial_rotary_factor=0.6,
        mrope_section=[2, 2, 2],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
        router_aux_loss_coef=0.02,
        thinker_hidden_size=48,
        accept_hidden_layer=2,
        projection_intermediate_size=36,
        num_code_groups=CODEBOOKS,
        codebook_size=CODEWORDS,
        codec_vocab_size=24,
        codec_pad_id=12,
        codec_bos_id=13,
        codec_eos_id=14,
        codec_text_id=15,
        codec_nothink_id=16,
        codec_think_bos_id=17,
        codec_think_eos_id=18,
        speaker_ids={"anna": 20, "ben": 21},
        code_predictor=CodePredictorConfig(
            hidden_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=44,
        ),
    )
    talker |= {name: changes.pop(name) for name in list(changes) if name in _TALKER}
    training = changes.pop("talker_training", TalkerTrainingConfig(predictor_fraction=0.5, residual_weight=0.7))
    recipe = small_recipe(parallel, row_tokens=row_tokens, **encoders(), **changes)
    recipe.network, recipe.talker_training = "talker", training
    recipe.model.talker = TalkerConfig(**talker)
    recipe.model.code2wav = Code2WavConfig(num_quantizers=CODEBOOKS, codebook_size=CODEWORDS)
    recipe.data.rows = "speech"
    recipe.data.speech = SpeechConfig(row_tokens=128, states=states)
    return recipe


def speech_row(lengths: list[int], seed: int, recipe: Recipe, thinker: SpeechRow | None = None) -> SpeechRow:
    """A row of random sequences: text, frames and control codes anywhere, and labels at some positions.

    With a Thinker's row, positions of the i-th sequence read states of its i-th sequence, where there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    talker, U, alignment = recipe.model.talker, recipe.data.speech.row_tokens, recipe.data.alignment

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    text, sources, labels = (torch.full((U,), fill) for fill in (-1, -1, IGNORE))
    codes, label_codes = torch.full((U, CODEBOOKS), -1), torch.full((U, CODEBOOKS - 1), IGNORE)
    padding, kinds = torch.ones(U, dtype=torch.bool), torch.zeros(U, dtype=torch.uint8)
    ended = torch.zeros(U, dtype=torch.bool)
    positions, boundaries, start = torch.zeros(3, U, dtype=torch.long), [0], 0
    context: list[int] = []
    for index, length in enumerate(lengths):
        here = torch.arange(start, start + length)
        padding[here] = False
        kind = draw(5, length)
        text[here[kind <= 1]] = draw(VOCAB, int((kind <= 1).sum()))
        frames = here[kind == 2]
        codes[frames] = draw(talker.codebook_size, len(frames), CODEBOOKS)
        codes[here[kind == 3], 0] = talker.codec_bos_id
        reading = here[kind == 4]
        if thinker is not None and index + 1 < len(thinker.cu_seqlens):
            low, high = thinker.cu_seqlens[index : index + 2].tolist()
            named = [low + int(draw(high - low, 1)) for _ in reading]
            sources[reading] = torch.arange(len(context), len(context) + len(named))
            context += named
        kinds[here] = torch.tensor([0, 0, 2, 3, 1], dtype=torch.uint8)[kind]
        predicts = here[draw(3, length) > 0]
        labels[predicts] = draw(talker.codebook_size, len(predicts))
        residual = predicts[draw(4, len(predicts)) > 0]
        label_codes[residual] = draw(talker.codebook_size, len(residual), CODEBOOKS - 1)
        ended[here[length // 2 :]] = True
        labels[here[-1]], label_codes[here[-1]] = talker.codec_eos_id, IGNORE
        padded = -(-length // alignment) * alignment
        positions[:, start : start + padded] = torch.arange(padded)
        start += padded
        boundaries.append(start)
    if start < U:
        positions[:, start:] = torch.arange(U - start)
        boundaries.append(U)
    below = vars(thinker) if thinker is not None else empty_thinker_row()
    return SpeechRow(
        **{name: below[name] for name in _THINKER_FIELDS if name in below},
        text_ids=text,
        sources=sources,
        codes=codes,
        speech_labels=labels,
        label_codes=label_codes,
        text_ended=ended,
        speech_positions=positions,
        speech_cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        speech_padding=padding,
        speech_kinds=kinds,
        draws=torch.rand(U, generator=generator),
        context=torch.tensor(context, dtype=torch.long),
        samples=len(lengths),
    )


_THINKER_FIELDS = [
    *("tokens", "labels", "loss_weights", "position_ids", "cu_seqlens", "padding", "modality"),
    *("mel", "mel_cu_seqlens", "audio_slots", "patches", "grid_thw", "vision_slots"),
]


def empty_thinker_row() -> dict[str, torch.Tensor]:
    """Fields of a Thinker's row without tokens."""
    none = torch.zeros(0, dtype=torch.long)
    return dict(
        tokens=none,
        labels=none,
        loss_weights=none.float(),
        position_ids=torch.zeros(3, 0, dtype=torch.long),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        padding=none.bool(),
    )


def speech_batches(steps: int, recipe: Recipe) -> list[list[SpeechRow]]:
    """`steps` global batches of two rows, uneven: some sequences read no states, some rows have no media."""
    lengths = [[37, 11, 25], [5, 61, 30], [110], [8, 8, 3, 50], [23, 23, 23], [70, 13], [1, 40, 33], [64]]
    sound, vision = [[130, 49], [], [97], []], [[], [(1, 4, 6), (3, 2, 4)], [(2, 4, 4)], []]
    batches = []
    for i in range(steps):
        rows = []
        for j in range(2):
            number, below = (2 * i + j) % 8, None
            if recipe.data.speech.states is not States.none:
                below = random_row([41, 17], recipe.data.row_tokens, seed=700 + 10 * i + j)
                add_media(below, sound[number % 4], vision[number % 4], seed=100 * i + j)
            rows.append(speech_row(lengths[number], 10 * i + j, recipe, below))
        batches.append(rows)
    return batches


class FakeTokenizer:
    """Tokenizer of letters, with the control tokens of the Talker's text."""

    im_start, im_end, end_of_text = 100, 101, 102

    def token_id(self, name: str) -> int:
        return {"<tts_pad>": 103, "<tts_text_bos>": 104, "<tts_text_eod>": 105}[name]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 90 for letter in text]
