"""The Thinker below a Talker: frozen, forward only, and only as many layers as are read.

Axis letters: T tokens of the row on this context-parallel rank, K states that are read, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.random_state import random_state, set_random_state
from omni_train.checkpoint.sharded import apply_model_state, load_sharded, model_state, read_model_config
from omni_train.checkpoint.store import resolve
from omni_train.data.rows.packing import aligned, pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.errors import UserError
from omni_train.models.row import LocalRow
from omni_train.models.thinker import Thinker, build_chunks
from omni_train.nn.context_parallel import context_slice_indices
from omni_train.objectives.base import Forward
from omni_train.recipe.schema import ModelConfig, Recipe, Recompute, ThinkerConfig, required


class FrozenThinker:
    """The first layers of a Thinker's checkpoint, in the layout of the run.

    Args:
        checkpoint: a checkpoint of network=thinker.
        recipe: recipe of the Talker; its layout, its encoders, and `model.talker.accept_hidden_layer`.
        check: function that refuses a recipe with a Thinker that the layout cannot split.

    Raises:
        UserError: the checkpoint is damaged, or its Thinker does not fit the Talker.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, check: Callable[[Recipe], None]) -> None:
        model = _fitting(checkpoint, recipe)
        model.thinker = _first_layers(model, recipe)
        below = replace(recipe, model=model, recompute=Recompute.none)
        check(below)
        self.alignment = math.lcm(recipe.data.alignment, recipe.parallel.tensor)
        drawn = random_state()
        self.stages: list[Thinker] = build_chunks(below, head=False)
        set_random_state(drawn)  # the Talker begins with the same weights, whether a Thinker runs or not
        _load(self.stages, checkpoint)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules that hold the Thinker's weights on this rank."""
        return list(self.stages)

    def states(self, engine: Forward, rows: Sequence[Any]) -> list[torch.Tensor]:
        """States of each row's `context`, (K, H), the same on every rank of a model group. Collective.

        Args:
            engine: runs the Thinker.
            rows: :class:`omni_train.data.rows.batch.SpeechRow` of this data rank.
        """
        for row in rows:
            row.prepared["context"] = row.context
        return [found["states"] for found in engine.forward(self.modules, rows, _read)]

    @torch.no_grad()
    def states_of(self, sequence: TokenSequence, positions: np.ndarray) -> torch.Tensor:
        """States (K, H) at positions (K,) of one sequence alone, without an engine: for generation.

        Collective over the tensor-parallel group; the layout must have no pipeline, context or expert parallelism.
        """
        (stage,) = self.stages
        row = pack(
            [sequence], row_tokens=aligned(len(sequence), self.alignment), alignment=self.alignment, padding_token=0
        )
        row.prepared["context"] = torch.from_numpy(positions)
        return stage(stage.local_row(row, 0, training=False), _read)["states"]


def open_thinker(path: str, recipe: Recipe, check: Callable[[Recipe], None]) -> FrozenThinker:
    """The Thinker of a checkpoint, or of a run's latest. Collective; process groups must exist.

    Raises:
        UserError: there is no checkpoint, or as :class:`FrozenThinker`.
    """
    checkpoint = resolve(path)
    require_intact(checkpoint, recipe.checkpoint.verify)
    return FrozenThinker(checkpoint, recipe, check)


def open_whole_thinker(path: str, recipe: Recipe) -> Thinker:
    """The whole Thinker of a checkpoint in one pipeline stage, to write what a Talker speaks. Collective.

    Args:
        path: checkpoint, or a run.
        recipe: recipe of the Talker above it, or of the Thinker where `model.talker` is null.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its Thinker does not fit the Talker.
    """
    checkpoint = resolve(path)
    require_intact(checkpoint, recipe.checkpoint.verify)
    model = _fitting(checkpoint, recipe)
    thinker = required(model.thinker)
    model.thinker = replace(thinker, pattern=thinker.pattern.replace("|", ""), mtp_num_hidden_layers=0)
    stages = build_chunks(replace(recipe, model=model, recompute=Recompute.none))
    _load(stages, checkpoint)
    return stages[0]


def _load(stages: list[Thinker], checkpoint: Path) -> None:
    """Load what these stages have of a checkpoint's model, and freeze them."""
    apply_model_state(stages, load_sharded(model_state(stages), checkpoint))
    for stage in stages:
        stage.eval().requires_grad_(False)


def _fitting(checkpoint: Path, recipe: Recipe) -> ModelConfig:
    """Model of a Thinker's checkpoint, which the recipe's Talker can read.

    Raises:
        UserError: it cannot.
    """
    model, talker = read_model_config(checkpoint), recipe.model.talker
    if model.thinker is None:
        raise UserError(f"talker_training.thinker={checkpoint}: no Thinker; give a checkpoint of network=thinker")
    if talker is None:
        return model
    for part in ("audio", "vision"):
        if getattr(model, part) != getattr(recipe.model, part):
            raise UserError(
                f"talker_training.thinker={checkpoint}: its model.{part} is not the recipe's; choose the model "
                "that it was trained with"
            )
    if model.thinker.hidden_size != talker.thinker_hidden_size or model.vocab_size != recipe.model.vocab_size:
        raise UserError(
            f"talker_training.thinker={checkpoint}: is {model.thinker.hidden_size} wide with {model.vocab_size} "
            f"tokens, the Talker reads {talker.thinker_hidden_size} and {recipe.model.vocab_size}; choose "
            "model.talker.thinker_hidden_size and model.vocab_size of that Thinker"
        )
    layers = len(model.thinker.pattern.replace("|", "") * model.thinker.repeats) // 2
    if talker.accept_hidden_layer > layers:
        raise UserError(
            f"model.talker.accept_hidden_layer={talker.accept_hidden_layer}: {checkpoint} has {layers} layers; read "
            "one of them"
        )
    return model


def _first_layers(model: ModelConfig, recipe: Recipe) -> ThinkerConfig:
    """Thinker of its first layers, cut into the pipeline stages of the run about as evenly as they go."""
    thinker, vision, layers = required(model.thinker), model.vision, required(recipe.model.talker).accept_hidden_layer
    symbols = thinker.pattern.replace("|", "") * thinker.repeats
    stages, total = recipe.parallel.pipeline * recipe.parallel.virtual_pipeline, 2 * layers
    # Vision's features are added on the first stage, which has them; behind the last layer none are.
    levels = min(len(vision.deepstack_visual_indexes), layers - 1) if vision else 0
    first = max(total // stages, 2 * levels)
    if first < 1 or total - first < stages - 1:
        raise UserError(
            f"model.talker.accept_hidden_layer={layers}: its mixers and feed-forwards, {total}, are too few for the "
            f"{stages} stages of parallel.pipeline·virtual_pipeline, of which the first takes {max(first, 1)} and each "
            "other one; read a higher layer or use fewer stages"
        )
    bounds = [0, *(first + (total - first) * stage // max(stages - 1, 1) for stage in range(stages))]
    pattern = "|".join(symbols[start:end] for start, end in itertools.pairwise(bounds))
    return replace(thinker, pattern=pattern, repeats=1, mtp_num_hidden_layers=0)


def _read(stage: Thinker, hidden: torch.Tensor, row: LocalRow) -> dict[str, torch.Tensor]:
    """States (K, H) at the positions of the whole row that its `prepared` names."""
    context_K = row.prepared["context"].to(hidden.device)
    if stage.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=stage.tp_group)
    hidden_TH, size = hidden[:, 0], parallel_state.get_context_parallel_world_size()
    if size == 1:
        return {"states": hidden_TH[context_K]}
    mine = context_slice_indices(row.packed.cu_seqlens_q, parallel_state.get_context_parallel_rank(), size)
    local = torch.full((len(hidden_TH) * size,), -1, device=hidden.device)
    local[mine] = torch.arange(len(mine), device=hidden.device)
    local_K = local[context_K]
    states_KH = torch.where(local_K[:, None] >= 0, hidden_TH[local_K.clamp(min=0)], 0)
    torch.distributed.all_reduce(states_KH, group=parallel_state.get_context_parallel_group())
    return {"states": states_KH}
