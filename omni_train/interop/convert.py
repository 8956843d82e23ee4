"""``omni-train convert``: Hugging Face folders to our checkpoints and back, one tensor's part at a time.

Import builds the model in any layout, each rank its own part, and reads just the rows that this part needs. Export
builds no model: it reads the tensors of the checkpoint, whatever layout wrote it, for one file of the folder at a time.
Neither ever holds a model twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.interop.folder import Folder, read_json
from omni_train.interop.qwen3_5 import tensor_map
from omni_train.interop.qwen3_5_config import FAMILIES, from_hugging_face, text_config, to_hugging_face
from omni_train.interop.rows import TensorMap, boxes, overlaps, row_count, spans
from omni_train.interop.writer import CheckpointReader, plan_files, write_files, write_index
from omni_train.platform.logs import say
from omni_train.recipe.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Recipe,
    ScheduleConfig,
    SourceConfig,
)
from omni_train.recipe.validate import validate

_TENSORS = "tensors.json"
"""In a checkpoint's ``hf`` folder: name and dtype of every tensor of the folder that it was imported from."""


def import_checkpoint(format: str, hf: Path, checkpoint: Path, parallel: ParallelConfig | None = None) -> None:
    """Write a checkpoint, for `init_from=`, from a Hugging Face folder; parameters keep the folder's types.

    Tokenizer, chat template, generation and configuration files travel with it, and come out again in an export.
    Collective: under a launcher all ranks take part, in the layout that `parallel` says.

    Args:
        format: qwen3_5_moe or qwen3_5 (dense).
        hf: folder with config.json and safetensors files.
        checkpoint: folder to write step_00000000 into.
        parallel: layout to convert in; the checkpoint does not depend on it.

    Raises:
        UserError: the folder is not of this format, or has a tensor too many or too few, or of another shape.
    """
    _check_format(format)
    if (checkpoint / "latest").exists():
        raise UserError(f"checkpoint={checkpoint}: there is a checkpoint already; choose another folder")
    folder = Folder(hf)
    mtp = any(name.startswith("mtp.") for name in folder.names)
    model = from_hugging_face(format, folder.config, name=hf.resolve().name, mtp=mtp)
    table = tensor_map(model, folder.names)
    folder.check(table)
    embedding = table["embedding.word_embeddings.weight"][0].name
    precision = Precision.bf16 if folder.dtype(embedding) is torch.bfloat16 else Precision.fp32
    recipe = _recipe(model, parallel or ParallelConfig(), precision)
    validate(recipe, platform.world_size())
    with _process_group():
        from omni_train.models.thinker import build_chunks
        from omni_train.training.checkpoint import CheckpointStore

        platform.parallel.initialize(recipe.parallel, recipe.seed)
        chunks = build_chunks(recipe)
        state = _read_state(chunks, table, folder)
        store = CheckpointStore(checkpoint, CheckpointConfig(asynchronous=False), model)
        with tempfile.TemporaryDirectory() as carried:
            if platform.rank() == 0:
                for file in folder.side_files():
                    shutil.copy(file, carried)
                types = {name: str(folder.dtype(name)).removeprefix("torch.") for name in folder.names}
                Path(carried, _TENSORS).write_text(json.dumps(types, indent=0))
            store.carried = Path(carried)
            store.save(0, chunks, None, {}, None, state=state)
            store.close()
        platform.parallel.destroy()
    say(f"imported {len(folder.names)} tensors from {hf}; start a run from them with init_from={checkpoint}")


def export_checkpoint(format: str, hf: Path, checkpoint: Path, max_file_gigabytes: float = 5.0) -> None:
    """Write a Hugging Face folder from a checkpoint of any layout.

    Tensors have the types, and the files beside them the content, of the folder that the checkpoint once came from. One
    that never did gives its own types and a config.json made from its model. Under a launcher the ranks share the work.

    Args:
        format: qwen3_5_moe or qwen3_5 (dense).
        hf: folder to write; it must not hold a model yet.
        checkpoint: a step_XXXXXXXX folder, or a run's (its latest).
        max_file_gigabytes: size of one safetensors file. Memory for one file and its largest tensor is needed.

    Raises:
        UserError: the checkpoint is not of this format, or lacks a tensor or has one too many.
    """
    from omni_train.training.checkpoint import read_model_config, resolve

    _check_format(format)
    platform.setup()
    if any(hf.glob("*.safetensors")):
        raise UserError(f"hf={hf}: there are safetensors files already; choose another folder")
    checkpoint = resolve(checkpoint)
    model = read_model_config(checkpoint)
    config = to_hugging_face(format, model)
    reader = CheckpointReader(checkpoint)
    carried = checkpoint / "hf"
    dtypes = {}
    if carried.is_dir():
        dtypes = {name: getattr(torch, dtype) for name, dtype in read_json(carried / _TENSORS).items()}
    table = tensor_map(model, dtypes.keys())
    reader.check(table)
    files = plan_files(reader, table, dtypes, int(max_file_gigabytes * 1e9))
    with _process_group():
        torch.distributed.barrier()  # all have seen the folder empty
        hf.mkdir(parents=True, exist_ok=True)
        write_files(reader, files, hf, platform.rank(), platform.world_size())
        torch.distributed.barrier()
        if platform.rank() == 0:
            write_index(files, hf)
            embedding = next(iter(files[0].values()))
            _write_side_files(format, hf, carried, config, str(embedding.dtype).removeprefix("torch."))
    say(f"exported {sum(map(len, files))} tensors from {checkpoint} to {hf}")


def _check_format(format: str) -> None:
    if format not in FAMILIES:
        raise UserError(f"format={format}: unknown; choose one of {', '.join(FAMILIES)}")


def _recipe(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> Recipe:
    """What building the model needs, around it what validation asks of a run of any layout."""
    row = 2 * parallel.context * parallel.tensor
    return Recipe(
        stage="convert",
        run="convert",
        precision=precision,
        model=model,
        parallel=parallel,
        data=DataConfig(
            name="none",
            path="none",
            tokenizer="none",
            sources=[SourceConfig(path="none")],
            row_tokens=row,
            alignment=row,
        ),
        optimizer=OptimizerConfig(lr=1.0),
        schedule=ScheduleConfig(steps=0, global_batch=platform.world_size() * parallel.pipeline),
    )


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    joined = torch.distributed.is_initialized()
    platform.init_distributed()
    try:
        yield
    finally:
        if not joined:
            torch.distributed.destroy_process_group()


@torch.no_grad()
def _read_state(chunks: list[torch.nn.Module], table: TensorMap, folder: Folder) -> dict:
    """Sharded state of this rank's part of the model, with the folder's values and types.

    The model's own parameters give their memory back one by one, so that nothing is there twice; they are spent.

    Raises:
        UserError: a parameter that the table does not have, or a tensor of another shape.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from omni_train.training.checkpoint import model_state

    whole = model_state(chunks)
    for chunk, state in zip(chunks, whole.values(), strict=True):
        parameters = dict(chunk.named_parameters())
        for name, entry in state.items():
            if isinstance(entry, ShardedTensorFactory):
                state[name] = [_read_part(part, table, folder) for part in entry.build()]
            elif isinstance(entry, ShardedTensor):
                state[name] = _read_part(entry, table, folder)
            del entry
            if name in parameters:
                parameters[name].data = torch.empty(0)
    return whole


def _read_part(part, table: TensorMap, folder: Folder):
    """The ``ShardedTensor`` with what the folder has for it."""
    if part.key not in table:
        raise UserError(f"{part.key}: a parameter of the model that {folder.path} has nothing for")
    if not table[part.key]:
        return part
    for rows in table[part.key]:
        shape, whole = folder.shape(rows.name), rows.stop is None
        if shape[-1] != part.global_shape[-1] or (whole and row_count(shape) != row_count(part.global_shape)):
            raise UserError(
                f"{folder.path}: {rows.name} has shape {shape}, which does not fit {part.key} of {part.global_shape}"
            )
    types = {folder.dtype(rows.name) for rows in table[part.key]}
    data = torch.empty_like(part.data, dtype=torch.float32 if len(types) > 1 else types.pop())
    all_spans = spans(part.key, part.global_shape, table[part.key])
    for target, first, columns in boxes(data, part.global_offset, part.global_shape):
        for here, name, source in overlaps(all_spans, first, first + len(target)):
            target[here] = folder.read(name, source, source + here.stop - here.start, columns)
    return dataclasses.replace(part, data=data, dtype=data.dtype)


def _write_side_files(format: str, hf: Path, carried: Path, config: dict[str, Any], dtype: str) -> None:
    """Tokenizer and the like as they came, and a config.json that says what the checkpoint is now."""
    original: dict[str, Any] = {}
    if carried.is_dir():
        for file in carried.iterdir():
            if file.name != _TENSORS:
                shutil.copy(file, hf)
        original = read_json(carried / "config.json")
        came_from = from_hugging_face(format, original, name="", mtp=config["mtp_num_hidden_layers"] > 0)
        if to_hugging_face(format, came_from) == config:
            return
    text_config(original).update(config, dtype=dtype)
    (hf / "config.json").write_text(json.dumps(original, indent=2) + "\n")
