"""What a folder of transformers' becomes in a layout: imported, run, and written out again."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from omni_train.recipe.schema import CheckpointConfig
from tests.support.hugging_face import tensors_of
from tests.support.thinker import small_recipe


def import_and_run(rank, world_size, format, hf, folder, parallel, rows):
    """Import; the first row's loss, and its gradients as a checkpoint; the rows' logits of real tokens (last stage)."""

    from megatron.core import parallel_state

    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.interop.convert import import_checkpoint
    from omni_train.objectives.base import GlobalBatch
    from omni_train.training.engines.base import global_sums
    from omni_train.training.engines.megatron import MegatronEngine

    import_checkpoint(format, Path(hf), folder / "imported", parallel)
    checkpoint = resolve(folder / "imported")
    row_tokens = len(rows[0].tokens)
    recipe = small_recipe(parallel, row_tokens=row_tokens)
    recipe.model = read_model_config(checkpoint)
    recipe.model.thinker.router_aux_loss_coef = 0.0
    if recipe.model.audio:
        recipe.model.audio.train_window_frames = [recipe.model.audio.eval_window_frames]
    platform.parallel.initialize(parallel, 1)
    engine = MegatronEngine(recipe)
    load_model(engine.chunks, checkpoint, recipe.model)

    def forward(iterator, chunk):
        hidden = chunk(chunk.module.local_row(next(iterator), 0, training=False))
        return hidden, lambda hidden, non_loss_data: chunk.module.logits(hidden).float()

    with torch.no_grad():
        logits = engine._microbatches.run(forward, engine.chunks, rows, forward_only=True, collect_non_loss_data=True)
    engine.chunks[0].zero_grad_buffer()
    group = parallel_state.get_data_parallel_group()
    batch = GlobalBatch(global_sums(engine.objective, rows[:1], group).weight, 0, training=True)
    metrics = engine._totals.over(engine._go_over(rows[:1], batch), training=True)
    with torch.no_grad():
        for parameter in engine.chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    store = CheckpointStore(folder / "gradients", CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, engine.chunks, None, {}, None)
    store.close()
    platform.parallel.destroy()
    return metrics, [part[~row.padding] for part, row in zip(logits, rows, strict=True)] if logits else None


def export(rank, world_size, format, hf, checkpoint):
    """Write a checkpoint out."""
    from omni_train.interop.convert import export_checkpoint

    export_checkpoint(format, Path(hf), Path(checkpoint))


def gradients_of(model, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of a model of transformers, by the names under which it saves the parameters."""
    spent = copy.deepcopy(model)
    with torch.no_grad():
        for mine, parameter in zip(spent.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    spent.save_pretrained(folder)
    return tensors_of(folder)
