"""Hugging Face model folder: tensors, read as slices without loading the rest, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omni_train.data.samples.files import read_regular
from omni_train.errors import UserError
from omni_train.interop.rows import TensorMap, row_count

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_ROWS = 1024  # compared at a time
_INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
LARGEST_JSON = 1 << 28  # bytes; the index of 100,000 tensors has 10 MB
_SIDE_FILES = {".json", ".jinja", ".txt", ".model"}


class Folder:
    """Tensors of a folder of safetensors files.

    Args:
        path: the folder.
        carries: whether the tensor of a name is not read, but carried along as it is.

    Raises:
        UserError: there is no ``config.json`` or no tensor, a file is missing or damaged, or two hold different tensors
            of one name.
    """

    def __init__(self, path: Path, carries: Callable[[str], bool] = lambda name: False) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self._where: dict[str, Any] = {}  # tensor -> the open file that holds it
        self._carried: dict[str, Any] = {}
        for file in self._files():
            if not file.is_file():
                raise UserError(f"{file}: there is no such file, and {_INDEX} names it; copy it too")
            try:
                opened = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a complete safetensors file ({error}); copy it again") from error
            for name in opened.keys():  # noqa: SIM118  not a dict
                where = self._carried if carries(name) else self._where
                if not _same(where.setdefault(name, opened), name, opened, name):
                    raise UserError(f"{file}: {name} is in another file of the folder too, with other values; keep one")
        if not self._where:
            raise UserError(f"{path}: no tensors here; give a folder with *.safetensors files")

    def _files(self) -> Iterable[Path]:
        index = self.path / _INDEX
        if not index.exists():
            return sorted(self.path.glob("*.safetensors"))
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: no weight_map in it; copy it again")
        return [self.path / name for name in sorted(set(weight_map.values()))]

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors to read."""
        return self._where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            UserError: the type is neither fp32 nor bf16.
        """
        code = self._where[name].get_slice(name).get_dtype()
        if code not in DTYPES:
            raise UserError(f"{self.path}: {name} is {code}; must be {' or '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Rows of a tensor, as :mod:`omni_train.interop.rows` counts them.

        Args:
            name: the tensor.
            start, stop: the rows, all of one expert, or of whole experts.
            columns: of each row.

        Returns:
            (stop − start, columns).
        """
        tensor, shape = self._where[name].get_slice(name), self.shape(name)
        if len(shape) not in (2, 3):
            return tensor[start:stop].reshape(stop - start, -1)[:, columns]
        if len(shape) == 2:
            return tensor[start:stop, columns]
        first, start = divmod(start, shape[1])
        last, stop = divmod(stop - first * shape[1], shape[1])
        if start == stop == 0:
            return tensor[first : first + last, :, columns].flatten(0, 1)
        return tensor[first : first + 1, start : last * shape[1] + stop, columns].squeeze(0)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            UserError: its type is neither fp32 nor bf16.
        """
        self.dtype(name)
        return self._where[name].get_tensor(name)

    def drop_tied(self, name: str, kept: str) -> None:
        """Drop a tensor that ``config.json`` ties to another one.

        Args:
            name: the tensor to drop.
            kept: the tensor that it is tied to.

        Raises:
            UserError: their values differ.
        """
        if not _same(self._where[name], name, self._where[kept], kept):
            raise UserError(f"{self.path}: {name} is not {kept}, to which config.json ties it; correct one of them")
        del self._where[name]

    def check(self, table: TensorMap) -> None:
        """Refuse a folder that is not exactly what the table reads.

        Raises:
            UserError: naming the first tensor that is superfluous, missing, or of another number of rows.
        """
        wanted: dict[str, int | None] = {}
        for parts in table.values():
            for part in parts:
                wanted[part.name] = max(part.stop or 0, wanted.get(part.name) or 0) or None
        if left_over := sorted(set(self.names) - wanted.keys()):
            raise UserError(f"{self.path}: {_first(left_over)}: nothing in this model corresponds to it")
        if missing := sorted(wanted.keys() - set(self.names)):
            raise UserError(f"{self.path}: {_first(missing)}: the model needs it, and the folder does not have it")
        for name, rows in wanted.items():
            if rows is not None and row_count(self.shape(name)) != rows:
                raise UserError(
                    f"{self.path}: {name} has shape {self.shape(name)}, but config.json makes it {rows} rows"
                )

    def copy_carried(self, to: Path) -> None:
        """Write the carried tensors to safetensors files in the folder `to`, one for each file that holds some."""
        files: dict[int, list[str]] = {}
        for name, opened in self._carried.items():
            files.setdefault(id(opened), []).append(name)
        for number, names in enumerate(files.values(), start=1):
            tensors = {name: self._carried[name].get_tensor(name) for name in names}
            save_file(tensors, to / f"carried-{number:05d}.safetensors", metadata={"format": "pt"})

    def side_files(self) -> Iterator[Path]:
        """Paths of configuration, tokenizer, chat template and generation files."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and file.suffix in _SIDE_FILES and not file.name.endswith(".index.json"):
                yield file


def tensor_bytes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file.

    Raises:
        UserError: the file is not a safetensors file.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > LARGEST_HEADER:
            raise UserError(f"{file}: a header of {size:,} bytes; must be a safetensors file")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        UserError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(read_regular(path, LARGEST_JSON).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a folder that save_pretrained wrote") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is the folder a model?") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _same(one: Any, name: str, other: Any, its_name: str) -> bool:
    """Whether tensors of two open files are equal in shape and values, whatever their types; a few rows at a time."""
    if one is other and name == its_name:
        return True
    ours, theirs = one.get_slice(name), other.get_slice(its_name)
    if ours.get_shape() != theirs.get_shape():
        return False
    if not ours.get_shape():
        return torch.equal(one.get_tensor(name), other.get_tensor(its_name))
    rows = range(0, ours.get_shape()[0], _ROWS)
    return all(torch.equal(ours[at : at + _ROWS].float(), theirs[at : at + _ROWS].float()) for at in rows)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
