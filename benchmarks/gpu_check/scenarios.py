"""Small runs for the CPU and the GPU, from one checkpoint and on the same rows.

Run as ``python -m benchmarks.gpu_check.scenarios FOLDER [NAME …]`` it makes the CPU's: the checkpoints that all start
from, and the metrics of every step in ``reference.json``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from omni_train import platform
from omni_train.recipe.schema import (
    CheckpointConfig,
    EngineName,
    OptimizerConfig,
    OptimizerName,
    Precision,
    Recipe,
    ZeroConfig,
)
from tests.support.codec import CODE2WAV, CODEC, TRAINING, wave_row
from tests.support.recognizer import TAG_END, recognizer_recipe, row_of, utterances
from tests.support.thinker import add_media, encoders, random_row, small_recipe

STEPS = 4
LEARNING_RATE = 3e-4


def thinker_recipe(**changes) -> Recipe:
    """Recipe of a Thinker with every kind of layer, both encoders and multi-token prediction, fit for GPU kernels."""
    sizes = dict(
        hidden_size=64,
        head_dim=32,
        mrope_section=[4, 2, 2],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        num_experts=8,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        mtp_num_hidden_layers=1,
        initializer_range=0.02,  # with larger weights, bf16's last bit alone moves the gradient's norm by a half
    )
    heard_and_seen = encoders(audio_hidden_size=32, vision_hidden_size=32)
    return small_recipe(**({"row_tokens": 192} | sizes | heard_and_seen | changes))


def thinker_rows(step: int) -> list:
    """Two rows of uneven sequences with sound, images and video in them."""
    sound, vision = [[130, 49, 16], [97]], [[(1, 4, 6), (3, 2, 4)], [(2, 4, 4)]]
    rows = [random_row([67, 5, 88], 192, seed=30 + 2 * step), random_row([9, 121, 1, 33], 192, seed=31 + 2 * step)]
    return [add_media(row, sound[i], vision[i], seed=70 + 2 * step + i) for i, row in enumerate(rows)]


def thinker(recipe: Recipe, start: Path | None, steps: int = STEPS, save: tuple[Path, int] | None = None) -> list[dict]:
    """Metrics of each step.

    Args:
        recipe: of the Thinker.
        start: checkpoint of the weights; None for fresh ones.
        steps: how many to take.
        save: (folder, step) writes a run's checkpoint there after that many steps, beside the training that goes on; a
            folder that has one is gone on from.
    """
    from omni_train.checkpoint.sharded import CheckpointStore, load_model
    from omni_train.training.engines.megatron import MegatronEngine

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    if start is not None:
        load_model(engine.chunks, start, recipe.model)
        engine.optimizer.reload_model_params()
    history, done, store = [], 0, None
    if save is not None:
        store = CheckpointStore(save[0], CheckpointConfig(), recipe.model)
        if (checkpoint := store.latest()) is not None:
            done = engine.resume(store, checkpoint)["step"]
    for step in range(done, steps):
        history.append(engine.train_step(thinker_rows(step), LEARNING_RATE, step).metrics)
        if save is not None and step + 1 == save[1]:
            engine.save(store, step + 1, {"step": step + 1}, None)
    if save is not None and save[1] == 0:
        engine.save(store, 0, {"step": 0}, None)
    if store is not None:
        store.close()
    platform.parallel.destroy()
    return history


def zero_recipes() -> dict[str, Recipe]:
    """Recipes of the networks that the ZeRO engine trains, by name."""
    common = dict(engine=EngineName.deepspeed, zero=ZeroConfig(stage=1))
    codec = small_recipe(network="codec", codec=CODEC, code2wav=CODE2WAV, codec_training=TRAINING, **common)
    return {"recognizer": recognizer_recipe(ctc=True, **common), "codec": codec}


def zero(recipe: Recipe, start: Path | None, save: Path | None = None, steps: int = 2) -> list[dict]:
    """Metrics of each step of the recipe's network, or its start written as a checkpoint into `save`."""
    from omni_train.objectives import recognition
    from omni_train.training.engines.zero import ZeroEngine

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    with patch.object(recognition, "Tokenizer"), patch.object(recognition, "tag_end", return_value=TAG_END):
        engine = ZeroEngine(replace(recipe, init_from=str(start) if start else None))
    store = engine.open_store(save or Path("/nonexistent"))
    engine.initialize(store)
    if save is not None:
        engine.save(store, 0, {"step": 0}, None)
    history = []
    for step in range(steps if start else 0):
        if recipe.network == "codec":
            rows = [wave_row(seed=2 * step), wave_row(seed=2 * step + 1)]
        else:
            clips = utterances(recipe)
            rows = [row_of(clips[:3]), row_of(clips[3:])]
        history.append(engine.train_step(rows, LEARNING_RATE, step).metrics)
    engine.close()
    platform.parallel.destroy()
    return history


def thinker_scenarios() -> dict[str, Recipe]:
    """Recipes of the Thinker's scenarios, by name."""
    muon = OptimizerConfig(name=OptimizerName.muon, lr=LEARNING_RATE, clip_grad=0.7, eps=1e-5)
    found = {"AdamW": thinker_recipe(), "AdamW, bf16": thinker_recipe(precision=Precision.bf16)}
    if importlib.util.find_spec("emerging_optimizers"):
        found["Muon"] = thinker_recipe(optimizer=muon)
    return found


def initial(folder: Path, name: str) -> Path:
    """Checkpoint that a scenario starts from."""
    return folder / name / "step_00000000"


def main(folder: Path, names: list[str]) -> None:
    """Write the checkpoints that all start from, and the CPU's metrics of the scenarios named, by default of all."""
    platform.init_distributed()
    thinker(thinker_recipe(), None, 0, save=(folder / "thinker", 0))
    reference = {}
    for name, recipe in thinker_scenarios().items():
        if not names or name in names:
            reference[name] = thinker(recipe, initial(folder, "thinker"))
    for name, recipe in zero_recipes().items() if importlib.util.find_spec("deepspeed") else ():
        if not names or name in names:
            zero(recipe, None, folder / name)
            reference[name] = zero(recipe, initial(folder, name))
    (folder / "reference.json").write_text(json.dumps(reference))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
