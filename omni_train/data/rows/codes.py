"""Codes beside speech in the shards: how they are read, and which codec made them.

``omni-train data codes`` writes ``key.codes.npy`` and, in the folder, ``codec.json``: the content hash of the codec
that made them, for the folder and for each of its shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from omni_train.data.samples.files import read_regular
from omni_train.data.samples.lengths import codec_frame_samples
from omni_train.data.samples.media.container import refused_as
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.sources import energon_path
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig, required

CODES = "codes.npy"
"""Name of the file of a key that holds its codes: (N, frames) uint16."""
VOICE_CODES = "voice.codes.npy"
"""The same of the reference utterance that says who is to speak."""
REASONS = {CODES: "", VOICE_CODES: "voice_"}
"""What the reasons for which codes could not be made begin with, by the name of their file."""
RECORD = "codec.json"
MAX_SECONDS = 600.0
"""Longest speech that is encoded by default, in seconds: the codec takes it in one piece, ten minutes in 8 GB."""
LARGEST_RECORD = 1 << 30  # bytes; a line for each shard


def content_hash(tensors: Mapping[str, torch.Tensor], config: Any) -> str:
    """SHA-256 over a codec's tensors, by name, type and shape, and the configuration it is built from."""
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def is_hash(text: str) -> bool:
    """Whether a recipe names a codec by its content, and not by a checkpoint."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def check_codes(data: DataConfig) -> None:
    """Refuse sources whose codes are not of the codec that the recipe names.

    Args:
        data: its ``codec`` is null or a content hash; whoever reads checkpoints has put that in a checkpoint's place.

    Raises:
        UserError: a source has no codes, or not in all shards, or another codec's.
    """
    if data.codec is None:
        return
    for source in data.sources:
        command = f"omni-train data codes data={source.path} codec=CHECKPOINT"
        try:
            record = read_record(source.path, RECORD)
        except (OSError, ValueError):
            raise UserError(f"data.sources: {source.path} has no codes; make them with `{command}`") from None
        for place, found in {"": record["codec"], **record["shards"]}.items():
            if found != data.codec:
                raise UserError(
                    f"data.codec={data.codec[:12]}…: the codes in {source.path}{place and '/' + place} are of another "
                    f"codec, {found[:12]}…; name that one, or make them anew with `{command}`"
                )


def codes_of(parts: Mapping[str, bytes], model: ModelConfig, samples: int) -> np.ndarray:
    """Codes (N, frames) int64 of a sample whose speech has ``samples`` samples.

    Raises SampleError: ``no_codes``, ``codes_unreadable``, or ``codes_mismatch`` where they are not as many codebooks
    or frames as the speech would have, or beyond the codebook.
    """
    code2wav = required(model.code2wav)
    codes = read_codes(parts, code2wav.num_quantizers, code2wav.codebook_size)
    if codes.shape[1] != -(-samples // codec_frame_samples(model)):
        raise SampleError("codes_mismatch")
    return codes


def read_codes(
    parts: Mapping[str, bytes], codebooks: int, codebook_size: int, file: str = CODES, name: str = "codes"
) -> np.ndarray:
    """Codes (N, frames) int64 of one of a sample's files, of as many frames as there are.

    Raises SampleError: ``no_…``, ``…_unreadable``, or ``…_mismatch`` of ``name``, as ``codes_of``.
    """
    codes = read_array(parts, file, name, "iu")
    if len(codes) != codebooks or (codes.size and not 0 <= codes.min() <= codes.max() < codebook_size):
        raise SampleError(f"{name}_mismatch")
    return codes.astype(np.int64)


def coded_samples(parts: Mapping[str, bytes], model: ModelConfig) -> int:
    """Length in samples, at most, of the speech that a sample's codes are of.

    Raises:
        SampleError: ``no_codes``, or ``codes_unreadable``.
    """
    return read_array(parts, CODES, "codes", "iu").shape[1] * codec_frame_samples(model)


def read_array(parts: Mapping[str, bytes], file: str, name: str, kinds: str) -> np.ndarray:
    """Array of two axes that ``numpy.save`` wrote, of one of numpy's ``kinds`` of numbers.

    ``numpy.load`` would allocate any shape that a header names before it looks for the numbers.

    Raises:
        SampleError: ``no_…``, or ``…_unreadable``, of ``name``.
    """
    if file not in parts:
        raise SampleError(f"no_{name}")
    data = parts[file]
    stream = io.BytesIO(data)
    with refused_as(f"{name}_unreadable"):
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](stream)
        if dtype.kind not in kinds or len(shape) != 2 or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise SampleError(f"{name}_unreadable")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")


def read_record(path: str, name: str) -> Any:
    """Record of what made the files beside the samples of a folder, by the name of its file.

    Raises:
        OSError, ValueError: there is none, or it is no JSON.
    """
    file = energon_path(path) / name
    return json.loads(read_regular(file.local_path(), LARGEST_RECORD) if file.is_local() else file.read_text())
