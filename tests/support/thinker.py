"""Small Thinkers and rows for tests, without files or Hydra."""

from __future__ import annotations

from dataclasses import fields

import torch

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.samples.lengths import audio_tokens, vision_tokens
from omni_train.recipe.schema import (
    AudioEncoderConfig,
    DataConfig,
    Decay,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Recipe,
    ScheduleConfig,
    ThinkerConfig,
    VisionEncoderConfig,
)

VOCAB = 112
_THINKER = {entry.name for entry in fields(ThinkerConfig)}


def small_recipe(parallel: ParallelConfig | None = None, *, row_tokens: int = 96, **changes) -> Recipe:
    """A recipe of a Thinker with every kind of layer, small, and divisible by the layouts tested.

    `changes` are fields of the Thinker's configuration, of the model's, or of the recipe.
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
    model |= {
        key: changes.pop(key) for key in list(changes) if key in _THINKER or key in ModelConfig.__dataclass_fields__
    }
    thinker = ThinkerConfig(**{key: model.pop(key) for key in list(model) if key in _THINKER})
    optimizer = OptimizerConfig(lr=3e-4, clip_grad=0.7, eps=1e-5)
    options = dict(seed=77, precision=Precision.fp32, loss_chunk_tokens=40, optimizer=optimizer) | changes
    return Recipe(
        stage="test",
        run="test",
        model=ModelConfig(thinker=thinker, **model),
        parallel=parallel or ParallelConfig(),
        data=DataConfig(name="test", path="", tokenizer="", row_tokens=row_tokens, alignment=8),
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


def encoders(**changes) -> dict:
    """Fields of the model for :func:`small_recipe` that let it hear and see."""
    audio = dict(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        num_mel_bins=32,
        conv_channels=6,
        chunk_frames=48,
        train_window_frames=[32, 0, 96],
        eval_window_frames=48,
    )
    vision = dict(
        hidden_size=32,
        depth=2,
        num_heads=2,
        intermediate_size=44,
        patch_size=4,
        num_position_embeddings=25,
    )
    audio |= {key.removeprefix("audio_"): changes[key] for key in changes if key.startswith("audio_")}
    vision |= {key.removeprefix("vision_"): changes[key] for key in changes if key.startswith("vision_")}
    return {"audio": AudioEncoderConfig(**audio), "vision": VisionEncoderConfig(**vision)}


def add_media(row: PackedBatch, clips: list[int], grids: list[tuple[int, int, int]], seed: int) -> PackedBatch:
    """Put sound (frames of each clip) and vision (patches of each image or video) for :func:`encoders` into a row.

    Their tokens stand anywhere in the row's sequences, in order; nothing is learned on them.
    """
    generator = torch.Generator().manual_seed(seed)
    model = encoders()
    sizes = [sum(audio_tokens(clip, model["audio"]) for clip in clips)]
    sizes.append(sum(vision_tokens(grid, model["vision"]) for grid in grids))
    real = (~row.padding).nonzero().squeeze(1)
    taken = real[torch.randperm(len(real), generator=generator)[: sum(sizes)]]
    row.audio_slots, row.vision_slots = (slots.sort().values for slots in taken.split(sizes))
    row.labels[taken], row.loss_weights[taken] = IGNORE, 0.0
    row.position_ids = row.position_ids + torch.randint(5, row.position_ids.shape, generator=generator)
    row.modality = torch.randint(5, row.tokens.shape, generator=generator).to(torch.uint8)
    row.mel = torch.randn(sum(clips), 32, generator=generator)
    row.mel_cu_seqlens = torch.tensor([0, *clips]).cumsum(0).to(torch.int32)
    patches = sum(t * h * w for t, h, w in grids)
    row.patches = torch.randint(256, (patches, 3 * 2 * 4 * 4), generator=generator, dtype=torch.uint8)
    row.grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    return row


def media_batches(steps: int) -> list[list[PackedBatch]]:
    """`steps` global batches of two rows: the first has no images and the second no sound, in every other batch."""
    sound = [[130, 49, 16], [], [97], [50, 33]]
    vision = [[], [(1, 4, 6), (3, 2, 4)], [(2, 4, 4)], [(1, 2, 2), (1, 8, 2)]]
    batches = global_batches(steps)
    for i, batch in enumerate(batches):
        for j, row in enumerate(batch):
            add_media(row, sound[(2 * i + j) % 4], vision[(2 * i + j) % 4], seed=100 * i + j)
    return batches


def global_batches(steps: int, row_tokens: int = 96) -> list[list[PackedBatch]]:
    """`steps` global batches of two rows of uneven sequences."""
    lengths = [[37, 11, 25], [5, 61], [90], [8, 8, 8, 3, 50], [23, 23, 23], [70, 13], [1, 40, 33], [64]]
    return [[random_row(lengths[(2 * i + j) % 8], row_tokens, seed=10 * i + j) for j in range(2)] for i in range(steps)]
