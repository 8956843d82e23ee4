"""Import of a Megatron network from a Hugging Face folder: each rank reads just the rows that its part needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.interop.config import from_hugging_face
from omni_train.interop.families import FAMILIES, Family
from omni_train.interop.folder import Folder
from omni_train.interop.rows import TensorMap, boxes, overlaps, row_count, row_size, spans
from omni_train.interop.talker_config import talker_from_hugging_face
from omni_train.interop.talker_folder import read_talker_config
from omni_train.interop.talker_tensors import TEXT_TABLE, of_talker, own_map, talker_map
from omni_train.interop.tensors import tensor_map
from omni_train.platform.logs import say
from omni_train.recipe.schema import (
    CheckpointConfig,
    Code2WavConfig,
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
    SpeechConfig,
    States,
    required,
)
from omni_train.recipe.validate import validate

TENSORS = "tensors.json"
"""In a checkpoint's ``hf`` folder: name and dtype of every tensor of the folder that it was imported from."""


@dataclass
class Source:
    """A network in a Hugging Face folder."""

    network: str
    model: ModelConfig  # that the checkpoint will hold
    folder: Folder
    table: TensorMap
    carries: bool = False  # whether the checkpoint keeps the tensors that the network does not read

    def recipe(self, parallel: ParallelConfig) -> Recipe:
        """Recipe to build the network with, and the least beside it that validation requires of a run in any layout.

        Raises:
            UserError: the layout cannot split the network.
        """
        row = 2 * parallel.context * parallel.tensor
        dtype = self.folder.dtype(self.table[TEXT_TABLE][0].name)
        model, rows, talker = self.model, "chats", self.model.talker
        if talker is not None:
            code2wav = Code2WavConfig(num_quantizers=talker.num_code_groups, codebook_size=talker.codebook_size)
            model, rows = dataclasses.replace(model, code2wav=code2wav), "speech"
        recipe = Recipe(
            stage="convert",
            run="convert",
            network=self.network,
            precision=Precision.bf16 if dtype is torch.bfloat16 else Precision.fp32,
            model=model,
            parallel=parallel,
            init_from=str(self.folder.path),
            data=DataConfig(
                name="none",
                path="none",
                tokenizer="none",
                sources=[SourceConfig(path="none")],
                rows=rows,
                row_tokens=row,
                alignment=row,
                media=MediaConfig(positions=Positions.contiguous),  # which any encoder can have
                speech=SpeechConfig(row_tokens=row, states=States.none),
            ),
            optimizer=OptimizerConfig(lr=1.0),
            schedule=ScheduleConfig(steps=0, global_batch=platform.world_size() * parallel.pipeline),
        )
        validate(recipe, platform.world_size())
        return recipe


def thinker_source(format: str, hf: Path) -> Source:
    """The Thinker in a folder of one of the families.

    Raises:
        UserError: the folder is not of this format, or has a tensor too many, too few or of another shape.
    """
    family = FAMILIES[format]
    folder = Folder(hf, carries=family.carries)
    model = from_hugging_face(format, folder.config, hf.resolve().name, folder.names)
    table = thinker_table(family, model, folder.names)
    embedding, head = table[TEXT_TABLE][0].name, f"{family.names.head}weight"
    if required(model.thinker).tie_word_embeddings and head in folder.names:
        folder.drop_tied(head, embedding)
    folder.check(table)
    return Source("thinker", model, folder, table, carries=True)


def talker_source(hf: Path) -> Source:
    """The Talker in a Qwen3-Omni's folder, with the Thinker's table of the text.

    Raises:
        UserError: as :func:`thinker_source`.
    """
    folder = Folder(hf, carries=lambda name: not of_talker(name))
    model = talker_from_hugging_face(folder.config, hf.resolve().name)
    table = talker_map(required(model.talker), folder.names)
    folder.check(table)
    return Source("talker", model, folder, table)


def own_talker_source(hf: Path) -> Source:
    """The Talker in a folder of our own names.

    Raises:
        UserError: as :func:`thinker_source`.
    """
    folder = Folder(hf)
    model = read_talker_config(folder.config, hf / "config.json")
    table = own_map(required(model.talker))
    folder.check(table)
    return Source("talker", model, folder, table)


def thinker_table(family: Family, model: ModelConfig, tensors: Collection[str]) -> TensorMap:
    """Tensor map of a folder with these tensors; without any, of a folder to write."""
    names = family.names if whole(family, model, tensors) else family.text_names
    assert names is not None, "a family without a language model alone has whole models only"
    return tensor_map(model, names, tensors)


def whole(family: Family, model: ModelConfig, tensors: Collection[str]) -> bool:
    """Whether a folder with these tensors, or one to write, is of a whole model."""
    return family.whole(tensors, encoders=bool(model.audio or model.vision))


def write_checkpoint(source: Source, recipe: Recipe, checkpoint: Path) -> None:
    """Write the checkpoint of a network; parameters keep the folder's types. Collective.

    Args:
        source: the network.
        recipe: of :meth:`Source.recipe`.
        checkpoint: folder to write step_00000000 into.

    Raises:
        UserError: a tensor has another shape.
    """
    from omni_train.checkpoint.sharded import CheckpointStore

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    chunks, folder = _build(recipe), source.folder
    state = _read_state(chunks, source.table, folder)
    store = CheckpointStore(checkpoint, CheckpointConfig(asynchronous=False, max_failures=1), source.model)
    with tempfile.TemporaryDirectory(dir=checkpoint, suffix=".partial") as carried:
        if platform.rank() == 0:
            if source.carries:
                folder.copy_carried(Path(carried))
            for file in folder.side_files():
                shutil.copy(file, carried)
            types = {name: str(folder.dtype(name)).removeprefix("torch.") for name in folder.names}
            Path(carried, TENSORS).write_text(json.dumps(types, indent=0))
        store.carried = Path(carried)
        store.save(0, chunks, None, {}, None, state=state)
        store.close()
    platform.parallel.destroy()
    say(f"imported {len(folder.names)} tensors from {folder.path}; start a run from them with init_from={checkpoint}")


def _build(recipe: Recipe) -> list[Any]:
    from omni_train.models import talker, thinker

    return (talker if recipe.network == "talker" else thinker).build_chunks(recipe)


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
