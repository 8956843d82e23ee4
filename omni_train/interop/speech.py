"""Codec and Code2Wav as folders of transformers: read into the state of our networks, and written from it.

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
from omni_train.recipe.speech import Code2WavConfig, CodecConfig

State = dict[str, Tensor]
_MIMI_DECODER = ("decoder.", "decoder_transformer.", "upsample.")
_CODE2WAV = "code2wav."


def read_mimi(path: Path, num_quantizers: int | None = None) -> tuple[CodecConfig, State]:
    """Encoder and quantiser of a MimiModel; its decoder is left.

    Args:
        path: a folder with config.json and safetensors files.
        num_quantizers: take the first so many codebooks alone; None for all.

    Returns:
        The sizes, and the state of ``SpeechCodec(sizes, None)`` with the folder's types.

    Raises:
        UserError: the folder is not a MimiModel's, or lacks a tensor or has one too many.
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
        config: their sizes.
        state: of a :class:`SpeechCodec`; what is not of encoder and quantiser is left.
        original: a ``config.json`` whose other keys are kept.
    """
    state = {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "quantizer."))}
    _write(path, mimi_tensors(config, state), state, codec_to_hugging_face(config), original)


def read_code2wav(path: Path) -> tuple[Code2WavConfig, State]:
    """A Code2Wav: a folder of its own, or a whole Qwen3-Omni's, of which the rest is left.

    Returns:
        The sizes, and the state of ``Code2Wav(sizes)`` with the folder's types.

    Raises:
        UserError: the folder has no Code2Wav, or lacks a tensor or has one too many.
    """
    folder = Folder(path)
    prefix = _CODE2WAV if any(name.startswith(_CODE2WAV) for name in folder.names) else ""
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
        config: its sizes.
        state: of a :class:`Code2Wav`.
        original: a ``config.json`` whose other keys are kept.
    """
    original = (original or {}).get("code2wav_config", original)
    _write(path, code2wav_tensors(config, state), state, code2wav_to_hugging_face(config), original)


def mimi_tensors(config: CodecConfig, ours: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensor of ours -> those of MimiModel that it is a stack of, or the one that it is."""
    codebooks = mimi_codebooks(config)
    rest = [name for name in ours if name not in codebooks]
    return {**_tensors(mimi_modules(config), rest), **codebooks}


def code2wav_tensors(config: Code2WavConfig, ours: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensor of ours -> the one of Qwen3-Omni's Code2Wav."""
    return _tensors(code2wav_modules(config), ours)


def _tensors(modules: Mapping[str, str], ours) -> dict[str, list[str]]:
    parts = {name: name.rpartition(".") for name in ours}
    return {name: [f"{modules[module]}.{parameter}"] for name, (module, _, parameter) in parts.items()}


def _shapes(network, *sizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in network(*sizes).state_dict().items()}


def _read(folder: Folder, names: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], present) -> State:
    """The tensors that the names say, of the shapes that they must have.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
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
    tensors = {}
    for ours, theirs in names.items():
        parts = state[ours] if _is_stack(ours) else [state[ours]]
        for their, part in zip(theirs, parts, strict=True):
            tensors[their] = part.reshape(part.shape or 1).clone()
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(merged({**config, "dtype": dtype}, original or {}), indent=2) + "\n")
