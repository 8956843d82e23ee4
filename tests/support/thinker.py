"""Small Thinkers and rows for tests, without files or Hydra."""

from __future__ import annotations

import torch

from omni_train.data.batch import IGNORE, PackedBatch
from omni_train.recipe.schema import (
    DataConfig,
    Decay,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Recipe,
    ScheduleConfig,
)

VOCAB = 112


def small_recipe(parallel: ParallelConfig | None = None, *, row_tokens: int = 96, **changes) -> Recipe:
    """A recipe of a Thinker with every kind of layer, small, and divisible by the layouts tested.

    `changes` are fields of the model configuration, or of the recipe.
    """
    model = dict(
        name="small",
        vocab_size=VOCAB,
        hidden_size=48,
        pattern="GEGE*EGE",
        repeats=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        partial_rotary_factor=0.5,
        mrope_section=[2, 2, 2],
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        router_aux_loss_coef=0.02,
        initializer_range=0.08,
    )
    model |= {key: changes.pop(key) for key in list(changes) if key in ModelConfig.__dataclass_fields__}
    options = dict(seed=77, precision=Precision.fp32, loss_chunk_tokens=40) | changes
    return Recipe(
        stage="test",
        run="test",
        model=ModelConfig(**model),
        parallel=parallel or ParallelConfig(),
        data=DataConfig(name="test", path="", tokenizer="", row_tokens=row_tokens, alignment=8),
        optimizer=OptimizerConfig(lr=3e-4, clip_grad=0.7, eps=1e-5),
        schedule=ScheduleConfig(steps=4, global_batch=2, decay=Decay.constant, warmup_fraction=0.0),
        **options,
    )


def random_row(lengths: list[int], row_tokens: int, seed: int, alignment: int = 8, vocab: int = VOCAB) -> PackedBatch:
    """A row of random sequences of the given lengths, packed as the loader packs them; some positions have no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(row_tokens, dtype=torch.long)
    labels = torch.full((row_tokens,), IGNORE)
    positions = torch.zeros(3, row_tokens, dtype=torch.long)
    padding = torch.ones(row_tokens, dtype=torch.bool)
    boundaries, start = [0], 0
    for length in lengths:
        sequence = torch.randint(vocab, (length,), generator=generator)
        tokens[start : start + length] = sequence
        labels[start : start + length - 1] = sequence[1:]
        padding[start : start + length] = False
        padded = -(-length // alignment) * alignment
        positions[:, start : start + padded] = torch.arange(padded)
        start += padded
        boundaries.append(start)
    if start < row_tokens:
        positions[:, start:] = torch.arange(row_tokens - start)
        boundaries.append(row_tokens)
    labels[torch.rand(row_tokens, generator=generator) < 0.15] = IGNORE
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        loss_weights=(labels != IGNORE).float(),
        position_ids=positions,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        padding=padding,
        samples=len(lengths),
    )


def global_batches(steps: int, row_tokens: int = 96) -> list[list[PackedBatch]]:
    """`steps` global batches of two rows of uneven sequences."""
    lengths = [[37, 11, 25], [5, 61], [90], [8, 8, 8, 3, 50], [23, 23, 23], [70, 13], [1, 40, 33], [64]]
    return [[random_row(lengths[(2 * i + j) % 8], row_tokens, seed=10 * i + j) for j in range(2)] for i in range(steps)]
