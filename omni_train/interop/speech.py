"""Codec and Code2Wav as Hugging Face folders: read into state dicts of our networks, and written from them.

These networks are small enough to be read whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_train.errors import UserError
from omni_train.interop.config import merged
from omni_train.interop.folder import Folder
from omni_train.interop.speech_config import (
    code2wav_from_hugging_face,
    code2wav_to_hugging_face,
    codec_from_hugging_face,
    codec_to_hugging_face,
)
from omni_train.interop.speech_names import code2wav_modules, mimi_codebooks, mimi_modules
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from omni_train.recipe.schema import Code2WavConfig, CodecConfig

State = dict[str, Tensor]
_MIMI_DECODER = ("decoder.", "decoder_transformer.", "upsample.")
CODE2WAV = "code2wav."


def read_mimi(path: Path, num_quantizers: int | None = None) -> tuple[CodecConfig, State]:
    """Encoder and quantiser of a MimiModel folder; its decoder is not read.

    Args:
        path: a folder with config.json and safetensors files.
        num_quantizers: number of codebooks to take, from the first; None for all.

    Returns:
        sizes, and the state dict of ``SpeechCodec(sizes, None)`` in the folder's types.

    Raises:
        UserError: the folder is not a MimiModel's, lacks a tensor, has one too many, or has fewer codebooks.
    """
    folder = Folder(path, carries=lambda name: name.startswith(_MIMI_DECODER))
    config = codec_from_hugging_face(folder.config)
    shapes = _shapes(SpeechCodec, config, None)
    names = mimi_tensors(config, shapes)
    state = _read(folder, names, shapes, dict.fromkeys(folder.names))
    if num_quantizers is not None:
        if not config.num_semantic_quantizers < num_quantizers <= config.num_quantizers:
            raise UserError(f"{path}: has {config.num_quantizers} codebooks, of which {num_quantizers} were asked for")
        config.num_quantizers = num_quantizers
        for ours, theirs in mimi_codebooks(config).items():
            state[ours] = state[ours][: len(theirs)].clone()
    return config, state


def write_mimi(path: Path, config: CodecConfig, state: Mapping[str, Tensor], original: Mapping | None = None) -> None:
    """Write encoder and quantiser as a MimiModel without a decoder.

    Args:
        path: folder to write.
        config: sizes of encoder and quantiser.
        state: state dict of a :class:`SpeechCodec`, of which only encoder and quantiser are written.
        original: a ``config.json`` whose other keys are kept.
    """
    state = {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "quantizer."))}
    _write(path, mimi_tensors(config, state), state, codec_to_hugging_face(config), original)


def read_code2wav(path: Path) -> tuple[Code2WavConfig, State]:
    """Code2Wav from a folder of its own, or from a whole Qwen3-Omni's, of which the rest is not read.

    Args:
        path: a folder with config.json and safetensors files.

    Returns:
        sizes, and the state dict of ``Code2Wav(sizes)`` in the folder's types.

    Raises:
        UserError: the folder has no Code2Wav, lacks a tensor or has one too many.
    """
    folder = Folder(path)
    prefix = CODE2WAV if any(name.startswith(CODE2WAV) for name in folder.names) else ""
    config = code2wav_from_hugging_face(folder.config)
    shapes = _shapes(Code2Wav, config)
    names = {ours: [prefix + their for their in theirs] for ours, theirs in code2wav_tensors(config, shapes).items()}
    return config, _read(folder, names, shapes, (name for name in folder.names if name.startswith(prefix)))


def write_code2wav(
    path: Path, config: Code2WavConfig, state: Mapping[str, Tensor], original: Mapping | None = None
) -> None:
    """Write a Code2Wav as a folder of its own.

    Args:
        path: folder to write.
        config: sizes of Code2Wav.
        state: state dict of a :class:`Code2Wav`.
        original: a ``config.json`` whose other keys are kept.
    """
    original = (original or {}).get("code2wav_config", original)
    _write(path, code2wav_tensors(config, state), state, code2wav_to_hugging_face(config), original)


def mimi_tensors(config: CodecConfig, ours: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of each of our tensors -> names of the MimiModel's that it is a stack of, or of the one it is."""
    codebooks = mimi_codebooks(config)
    rest = [name for name in ours if name not in codebooks]
    return {**_tensors(mimi_modules(config), rest), **codebooks}


def code2wav_parts(config: Code2WavConfig, state: Mapping[str, Tensor]) -> State:
    """Tensors of a Code2Wav by the names that they have in a whole Qwen3-Omni's folder.

    Args:
        config: sizes of Code2Wav.
        state: state dict of a :class:`Code2Wav`.
    """
    return {CODE2WAV + name: tensor for name, tensor in _to_write(code2wav_tensors(config, state), state).items()}


def code2wav_tensors(config: Code2WavConfig, ours: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of each of our tensors -> name of the one of Qwen3-Omni's Code2Wav, in a list."""
    return _tensors(code2wav_modules(config), ours)


def _tensors(modules: Mapping[str, str], ours) -> dict[str, list[str]]:
    parts = {name: name.rpartition(".") for name in ours}
    return {name: [f"{modules[module]}.{parameter}"] for name, (module, _, parameter) in parts.items()}


def _shapes(network, *sizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in network(*sizes).state_dict().items()}


def _read(folder: Folder, names: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], present) -> State:
    """State dict read from a folder.

    Raises:
        UserError: naming the first tensor that is missing, superfluous or of another shape.
    """
    present, wanted = set(present), {their for theirs in names.values() for their in theirs}
    for missing in sorted(wanted - present):
        raise UserError(f"{folder.path}: {missing}: the model needs it, and the folder does not have it")
    for left_over in sorted(present - wanted):
        raise UserError(f"{folder.path}: {left_over}: nothing in this model corresponds to it")
    state = {}
    for ours, theirs in names.items():
        shape = _one_of(shapes[ours]) if _is_stack(ours) else shapes[ours]
        for their in theirs:
            if folder.shape(their) != shape:
                raise UserError(
                    f"{folder.path}: {their} has shape {folder.shape(their)}, but config.json makes it {shape}"
                )
        tensors = [folder.tensor(their) for their in theirs]
        state[ours] = torch.stack(tensors).view(shapes[ours]) if _is_stack(ours) else tensors[0]
    return state


def _is_stack(name: str) -> bool:
    return ".codebooks." in name


def _one_of(stack: tuple[int, ...]) -> tuple[int, ...]:
    return stack[1:] or (1,)  # theirs has an axis where ours is a number


def _write(path: Path, names, state: Mapping[str, Tensor], config: dict[str, Any], original: Mapping | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_file(_to_write(names, state), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(merged({**config, "dtype": dtype}, original or {}), indent=2) + "\n")


def _to_write(names: Mapping[str, list[str]], state: Mapping[str, Tensor]) -> State:
    """Tensors by the folder's names."""
    tensors = {}
    for ours, theirs in names.items():
        parts = state[ours] if _is_stack(ours) else [state[ours]]
        for their, part in zip(theirs, parts, strict=True):
            tensors[their] = part.reshape(part.shape or 1).clone()
    return tensors
