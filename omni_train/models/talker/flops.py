"""FLOPs of a training step of the Talker and of the Thinker below it, for TFLOP/s and model FLOPs utilisation.

Counted as in :mod:`omni_train.models.thinker.flops`: a backward pass costs twice the forward, and the Thinker has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.models.thinker.flops import attention_flops, audio_flops, stack_flops, vision_flops
from omni_train.recipe.schema import Recipe, StackConfig, States, required


def predictor_flops(recipe: Recipe) -> float:
    """Forward FLOPs of the code predictor on one frame: one pass over its codebooks."""
    talker = required(recipe.model.talker)
    sizes, codebooks = talker.code_predictor, talker.num_code_groups
    query, kv = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    layer = 2 * sizes.hidden_size * (2 * query + 2 * kv + 3 * sizes.intermediate_size)
    scores = 4 * query * codebooks * (codebooks + 1) / 2
    heads = 2 * sizes.hidden_size * talker.codebook_size * (codebooks - 1)
    return sizes.num_hidden_layers * (codebooks * layer + scores) + heads


def step_flops(recipe: Recipe, rows: Sequence[SpeechRow]) -> float:
    """FLOPs of forward and backward of one training step over packed rows, padding excluded."""
    model, talker = recipe.model, required(recipe.model.talker)
    projection = 2 * talker.projection_intermediate_size * (talker.thinker_hidden_size + talker.hidden_size)
    head = 2 * talker.hidden_size * talker.codec_vocab_size
    per_frame = predictor_flops(recipe) * recipe.talker_training.predictor_fraction
    below = _layers_below(recipe) if recipe.data.speech.states is States.live else None
    total = 0.0
    for row in rows:
        lengths = _lengths(row.speech_cu_seqlens.tolist(), row.speech_padding)
        total += 3 * sum(lengths) * stack_flops(talker) + 3 * attention_flops(talker, lengths)
        total += 3 * float((row.text_ids >= 0).sum() + (row.sources >= 0).sum()) * projection
        total += 3 * float((row.speech_labels != IGNORE).sum()) * head
        total += 3 * float((row.label_codes[:, 0] != IGNORE).sum()) * per_frame
        if below is not None and len(row.tokens):
            lengths = _lengths(row.cu_seqlens.tolist(), row.padding)
            total += sum(lengths) * stack_flops(below) + attention_flops(below, lengths)
            total += audio_flops(model, row.mel_cu_seqlens.diff().tolist()) if model.audio else 0
            total += vision_flops(model, row.grid_thw.tolist()) if model.vision else 0
    return total


def _layers_below(recipe: Recipe) -> StackConfig | None:
    """The Thinker's layers that run, where the recipe's model has them."""
    thinker, talker = recipe.model.thinker, required(recipe.model.talker)
    if thinker is None:
        return None
    symbols = thinker.pattern.replace("|", "") * thinker.repeats
    return replace(thinker, pattern=symbols[: 2 * talker.accept_hidden_layer], repeats=1)


def _lengths(boundaries: list[int], padding) -> list[int]:
    """Lengths of a row's sequences without padding."""
    real = [0, *(~padding).cumsum(0).tolist()]
    counts = [real[end] for end in boundaries]
    return [after - before for before, after in pairwise(counts)]
