"""``omni-train convert``: Hugging Face folders to our checkpoints and back, a part of a tensor at a time.

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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.reader import CheckpointReader
from omni_train.checkpoint.store import holds_checkpoints, resolve
from omni_train.errors import UserError
from omni_train.interop import speech_convert
from omni_train.interop.config import from_hugging_face, merged, to_hugging_face
from omni_train.interop.families import FAMILIES, Family
from omni_train.interop.folder import Folder, read_json
from omni_train.interop.rows import TensorMap, boxes, overlaps, row_count, row_size, spans
from omni_train.interop.tensors import tensor_map
from omni_train.interop.writer import plan_files, write_files, write_index
from omni_train.platform.logs import say
from omni_train.recipe.schema import (
    CheckpointConfig,
    DataConfig,
    MediaConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Positions,
    Precision,
    Recipe,
    ScheduleConfig,
    SourceConfig,
    Verify,
)
from omni_train.recipe.validate import validate
from omni_train.training.run_lock import holding

_TENSORS = "tensors.json"
"""In a checkpoint's ``hf`` folder: name and dtype of every tensor of the folder that it was imported from."""


def import_checkpoint(
    format: str,
    hf: Path,
    checkpoint: Path,
    parallel: ParallelConfig | None = None,
    num_quantizers: int | None = None,
) -> None:
    """Write a checkpoint, for `init_from=`, from a Hugging Face folder; parameters keep the folder's types.

    Tokenizer, chat template, generation and configuration files travel with it, and so do Talker and Code2Wav, which
    have no model here; all come out again in an export.
    Collective: under a launcher all ranks take part, in the layout that `parallel` says.

    Args:
        format: qwen3_5_moe, qwen3_5 (dense), both with or without vision, or qwen3_omni_moe; of speech, mimi (encoder
            and quantiser) or qwen3_omni_code2wav (from a Qwen3-Omni or alone).
        hf: folder with config.json and safetensors files.
        checkpoint: folder to write step_00000000 into.
        parallel: layout to convert in; the checkpoint does not depend on it.
        num_quantizers: number of a Mimi's codebooks to take, from the first; None for all.

    Raises:
        UserError: the folder is not of this format, or has a tensor too many, too few or of another shape; or
            `checkpoint` holds checkpoints already.
    """
    _refuse_checkpoints(checkpoint)
    if format in speech_convert.FORMATS:
        with holding(checkpoint, remedy=_ELSEWHERE, when_held=lambda: _refuse_checkpoints(checkpoint)):
            speech_convert.import_speech(format, hf, checkpoint, num_quantizers)
        return
    family = _family(format)
    if num_quantizers is not None:
        raise UserError(f"num_quantizers={num_quantizers}: must be left out unless format=mimi")
    folder = Folder(hf, carries=family.carries)
    model = from_hugging_face(format, folder.config, hf.resolve().name, folder.names)
    table = _table(family, model, folder.names)
    embedding = table["embedding.word_embeddings.weight"][0].name
    head = f"{family.names.head}weight"
    if model.thinker.tie_word_embeddings and head in folder.names:
        folder.drop_tied(head, embedding)
    folder.check(table)
    precision = Precision.bf16 if folder.dtype(embedding) is torch.bfloat16 else Precision.fp32
    recipe = _recipe(model, parallel or ParallelConfig(), precision)
    validate(recipe, platform.world_size())
    alone = holding(checkpoint, remedy=_ELSEWHERE, when_held=lambda: _refuse_checkpoints(checkpoint))
    with _process_group(), alone:
        from omni_train.checkpoint.sharded import CheckpointStore
        from omni_train.models.thinker import build_chunks

        platform.parallel.initialize(recipe.parallel, recipe.seed)
        chunks = build_chunks(recipe)
        state = _read_state(chunks, table, folder)
        store = CheckpointStore(checkpoint, CheckpointConfig(asynchronous=False, max_failures=1), model)
        with tempfile.TemporaryDirectory(dir=checkpoint, suffix=".partial") as carried:
            if platform.rank() == 0:
                folder.copy_carried(Path(carried))
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
        format: qwen3_5_moe, qwen3_5 (dense) or qwen3_omni_moe; of speech, mimi or qwen3_omni_code2wav.
        hf: folder to write; it must not hold a model yet.
        checkpoint: a step_XXXXXXXX folder, or a run's (its latest).
        max_file_gigabytes: size of one safetensors file; Talker and Code2Wav keep the files that they came in. Memory
            for one file and its largest tensor is needed.

    Raises:
        UserError: the checkpoint is damaged, not of this format, lacks a tensor or has one too many; or `hf` holds a
            model already.
    """
    from omni_train.checkpoint.sharded import read_model_config

    _refuse_tensors(hf)
    if format in speech_convert.FORMATS:
        with holding(hf, remedy=_ELSEWHERE, when_held=lambda: _refuse_tensors(hf)):
            speech_convert.export_speech(format, hf, checkpoint)
        return
    family = _family(format)
    platform.setup()
    checkpoint = resolve(checkpoint)
    with _process_group(), holding(hf, remedy=_ELSEWHERE, when_held=lambda: _refuse_tensors(hf)):
        require_intact(checkpoint, Verify.all)
        model = read_model_config(checkpoint)
        reader = CheckpointReader(checkpoint)
        carried = checkpoint / "hf"
        dtypes = {}
        if carried.is_dir():
            dtypes = {name: getattr(torch, str(dtype), None) for name, dtype in read_json(carried / _TENSORS).items()}
            if not all(isinstance(dtype, torch.dtype) for dtype in dtypes.values()):
                raise UserError(f"{carried / _TENSORS}: not the types of tensors; import the folder again")
        config = to_hugging_face(format, model, whole=_whole(family, model, dtypes))
        table = _table(family, model, dtypes)
        reader.check(table)
        files = plan_files(reader, table, dtypes, int(max_file_gigabytes * 1e9))
        embedding = next(iter(files[0].values()))
        files += sorted(carried.glob("*.safetensors"))
        write_files(reader, files, hf, platform.rank(), platform.world_size())
        torch.distributed.barrier()
        if platform.rank() == 0:
            tensors = write_index(files, hf)
            _write_side_files(format, hf, carried, config, dtypes, str(embedding.dtype).removeprefix("torch."))
            say(f"exported {tensors} tensors from {checkpoint} to {hf}")


_ELSEWHERE = "choose another folder"


def _refuse_checkpoints(checkpoint: Path) -> None:
    if holds_checkpoints(checkpoint):
        raise UserError(f"checkpoint={checkpoint}: there is a checkpoint already; {_ELSEWHERE}")


def _refuse_tensors(hf: Path) -> None:
    if any(hf.glob("*.safetensors")):
        raise UserError(f"hf={hf}: there are safetensors files already; {_ELSEWHERE}")


def _family(format: str) -> Family:
    if format not in FAMILIES:
        known = ", ".join([*FAMILIES, *speech_convert.FORMATS])
        raise UserError(f"format={format}: unknown; choose one of {known}")
    return FAMILIES[format]


def _whole(family: Family, model: ModelConfig, tensors: Collection[str]) -> bool:
    return family.whole(tensors, encoders=bool(model.audio or model.vision))


def _table(family: Family, model: ModelConfig, tensors: Collection[str]) -> TensorMap:
    """Tensor map of a folder with these tensors; without any, of a folder to write."""
    names = family.names if _whole(family, model, tensors) else family.text_names
    return tensor_map(model, names, tensors)


def _recipe(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> Recipe:
    """Recipe to build the model with, and the least beside it that validation requires of a run in any layout."""
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
            media=MediaConfig(positions=Positions.contiguous),  # which any encoder can have
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
    """Sharded state dict of this rank's part of the model, with the folder's values and types.

    The model's own parameters are emptied one by one, so that no tensor is held twice; the model cannot be used after.

    Raises:
        UserError: a parameter is not in the table, or a tensor has another shape.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from omni_train.checkpoint.sharded import model_state

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
    """A ``ShardedTensor`` filled from the folder."""
    if part.key not in table:
        raise UserError(f"{folder.path}: has nothing for {part.key}, a parameter of the model")
    if not table[part.key]:
        return part
    for rows in table[part.key]:
        theirs, ours = folder.shape(rows.name), part.global_shape
        fits = row_size(theirs) == row_size(ours) and (rows.stop is not None or row_count(theirs) == row_count(ours))
        if not fits:
            raise UserError(f"{folder.path}: {rows.name} has shape {theirs}, which does not fit {part.key} of {ours}")
    types = {folder.dtype(rows.name) for rows in table[part.key]}
    data = torch.empty_like(part.data, dtype=torch.float32 if len(types) > 1 else types.pop())
    all_spans = spans(part.key, part.global_shape, table[part.key])
    for target, first, columns in boxes(data, part.global_offset, part.global_shape):
        for here, name, source in overlaps(all_spans, first, first + len(target)):
            target[here] = folder.read(name, source, source + here.stop - here.start, columns)
    return dataclasses.replace(part, data=data, dtype=data.dtype)


def _write_side_files(
    format: str, hf: Path, carried: Path, config: dict[str, Any], tensors: Collection[str], dtype: str
) -> None:
    """Write the tokenizer and other files as they were imported, and a config.json of the exported model."""
    original = dict(FAMILIES[format].config_extras)
    if carried.is_dir():
        for file in carried.iterdir():
            if file.name != _TENSORS and file.suffix != ".safetensors":
                shutil.copy(file, hf)
        original = read_json(carried / "config.json")
        came_from = from_hugging_face(format, original, "", tensors)
        if to_hugging_face(format, came_from, whole=_whole(FAMILIES[format], came_from, tensors)) == config:
            return
        if "text_config" in config and "text_config" not in original:
            original = {"text_config": original}  # a language model that was given a vision encoder
    (hf / "config.json").write_text(json.dumps(merged({**config, "dtype": dtype}, original), indent=2) + "\n")
