"""Speed of a training step against ``transformers``: forward, backward and AdamW, on one row and on mixed lengths.

Both sides start from the same random ``Qwen3_5MoeForCausalLM`` in fp32.
Packing is here what padding is there: samples of 32 to 1,024 tokens go into rows of 4,096, or into batches of 8, each
padded to its longest (64 in one batch would not fit a laptop's memory). Only tokens of samples count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.sides import processes, take_turns
from omni_train import platform
from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.rows.packing import aligned, best_fit, pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    Recipe,
    ScheduleConfig,
    ThinkerConfig,
)
from omni_train.threads import keep_awake

REPEATS = {"row": 5, "mixed": 3}
ROW_TOKENS = 4096
PADDED_BATCH = 8
LEARNING_RATE = 1e-4

SIZES = dict(
    vocab_size=4096,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
)


def reference_model() -> torch.nn.Module:
    """Random model of ``transformers``: 8 layers, of which every fourth is attention."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    torch.manual_seed(11)
    rotary = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]}
    config = Qwen3_5MoeTextConfig(
        **SIZES, num_hidden_layers=8, rope_parameters=rotary, use_cache=False, pad_token_id=0, router_aux_loss_coef=0.0
    )
    return Qwen3_5MoeForCausalLM(config).train()


def recipe() -> Recipe:
    """Recipe of the same model."""
    return Recipe(
        stage="bench",
        run="bench",
        precision=Precision.fp32,
        model=ModelConfig(
            name="bench",
            vocab_size=SIZES["vocab_size"],
            thinker=ThinkerConfig(
                pattern="GEGEGE*E",
                repeats=2,
                mrope_section=[4, 2, 2],
                router_aux_loss_coef=0.0,
                **{key: value for key, value in SIZES.items() if key != "vocab_size"},
            ),
        ),
        data=DataConfig(name="bench", path="", tokenizer="", row_tokens=ROW_TOKENS),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, clip_grad=0.0),
        schedule=ScheduleConfig(steps=1, global_batch=1),
    )


def samples(kind: str) -> list[torch.Tensor]:
    """Random token ids: ``row`` one sample of 4,096 tokens, ``mixed`` 64 samples of 32 to 1,024."""
    generator = torch.Generator().manual_seed(5)
    lengths = [ROW_TOKENS] if kind == "row" else torch.randint(32, 1025, (64,), generator=generator).tolist()
    return [torch.randint(1, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]


def packed(tokens: list[torch.Tensor], alignment: int) -> list[PackedBatch]:
    """Samples in as few rows as best-fit packing needs."""
    waiting = [TokenSequence(ids.numpy(), torch.cat([ids[1:], torch.tensor([IGNORE])]).numpy()) for ids in tokens]
    rows = []
    while waiting:
        chosen = best_fit([(aligned(len(sequence), alignment),) for sequence in waiting], (ROW_TOKENS,))
        rows.append(pack([waiting[i] for i in chosen], row_tokens=ROW_TOKENS, alignment=alignment, padding_token=0))
        waiting = [sequence for i, sequence in enumerate(waiting) if i not in chosen]
    return rows


def padded(tokens: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Samples in batches of ``PADDED_BATCH``, each padded to its longest, as arguments of the reference."""
    batches = []
    for start in range(0, len(tokens), PADDED_BATCH):
        group = tokens[start : start + PADDED_BATCH]
        ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
        batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, IGNORE)}
        if (ids == 0).any():
            batch["attention_mask"] = (ids != 0).long()
        batches.append(batch)
    return batches


def theirs(folder: Path) -> Callable[[str], float]:
    """Step of ``transformers``: kind of samples -> mean loss per token before the update."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that its fast kernels need a GPU is known
    model = reference_model()
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batches = {kind: padded(samples(kind)) for kind in REPEATS}

    def step(kind: str) -> float:
        targets = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches[kind])
        total = 0.0
        for batch in batches[kind]:
            loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def ours(folder: Path) -> Callable[[str], float]:
    """Step of our engine: kind of samples -> mean loss per token before the update."""
    platform.init_distributed()
    from omni_train.checkpoint.sharded import load_model
    from omni_train.checkpoint.store import resolve
    from omni_train.interop.convert import import_checkpoint
    from omni_train.training.engines.megatron import MegatronEngine

    import_checkpoint("qwen3_5_moe", folder, folder / "imported")
    platform.parallel.initialize(recipe().parallel, recipe().seed)
    engine = MegatronEngine(recipe())
    load_model(engine.chunks, resolve(folder / "imported"), recipe().model)
    engine.optimizer.reload_model_params()
    rows = {kind: packed(samples(kind), recipe().data.alignment) for kind in REPEATS}
    return lambda kind: engine.train_step(rows[kind], LEARNING_RATE).metrics["loss"]


def run(threads: int = 2) -> list[dict]:
    """Rows of name, value and unit."""
    keep_awake()  # as the command line does; both sides inherit it
    with processes({"transformers": theirs, "omni_train": ours}, threads) as sides:
        return [row for kind in REPEATS for row in _compare(kind, sides)]


def _compare(kind: str, sides: dict[str, Connection]) -> list[dict]:
    seconds, rounds = take_turns(sides, [(side, kind) for side in sides], REPEATS[kind])
    for step, losses in enumerate(rounds):
        # Weight decay spares other parameters on each side, so that later losses part slowly.
        if not math.isclose(*losses, rel_tol=1e-3):
            raise RuntimeError(f"the sides do not train the same model: losses {losses} in step {step} of {kind}")
    tokens = sum(map(len, samples(kind)))
    reference, own = (tokens / median for median in seconds)
    name = f"train step, {kind}, {tokens:,} tokens"
    return [
        {"name": f"{name}, transformers", "value": reference, "unit": "tokens/s"},
        {"name": f"{name}, omni_train", "value": own, "unit": "tokens/s"},
        {"name": f"{name}, ratio", "value": own / reference, "unit": "×"},
    ]
