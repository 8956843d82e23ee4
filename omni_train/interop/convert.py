"""``omni-train convert``: Hugging Face folders to our checkpoints and back, a part of a tensor at a time.

Import builds the model in any layout, each rank its own part, and reads just the rows that this part needs. Export
builds no model. Neither ever holds a model twice.
"""

from __future__ import annotations

from pathlib import Path

import torch

from omni_train import platform
from omni_train.checkpoint.store import holds_checkpoints
from omni_train.errors import UserError
from omni_train.interop import exporting, importing, speech_convert
from omni_train.interop.families import FAMILIES
from omni_train.interop.writer import write_files, write_index
from omni_train.platform.logs import say
from omni_train.recipe.schema import ParallelConfig
from omni_train.training.run_lock import holding

_OMNI, _TALKER, _OWN_TALKER = "qwen3_omni_moe", "qwen3_omni_talker", "omni_talker"
_ELSEWHERE = "choose another folder"


def import_checkpoint(
    format: str,
    hf: Path,
    checkpoint: Path,
    parallel: ParallelConfig | None = None,
    num_quantizers: int | None = None,
    talker: Path | None = None,
    code2wav: Path | None = None,
) -> None:
    """Write a checkpoint, for `init_from=`, from a Hugging Face folder; parameters keep the folder's types.

    Tokenizer, chat template, generation and configuration files travel with it, and Talker and Code2Wav with the
    Thinker of a Qwen3-Omni, unread; all come out again in an export.
    Collective: under a launcher all ranks take part, in the layout that `parallel` says.

    Args:
        format: qwen3_5_moe, qwen3_5 (dense), both with or without vision, or qwen3_omni_moe (its Thinker);
            qwen3_omni_talker (the Talker of a Qwen3-Omni); omni_talker (a Talker that was exported so); of speech, mimi
            (encoder and quantiser) or qwen3_omni_code2wav (from a Qwen3-Omni or alone).
        hf: folder with config.json and safetensors files.
        checkpoint: folder to write step_00000000 into.
        parallel: layout to convert in; the checkpoint does not depend on it.
        num_quantizers: number of a Mimi's codebooks to take, from the first; None for all.
        talker: with format=qwen3_omni_moe, another folder to write a checkpoint of its Talker into.
        code2wav: the same for its Code2Wav.

    Raises:
        UserError: the folder is not of this format, or has a tensor too many, too few or of another shape; or a folder
            to write holds checkpoints already.
    """
    _check_format(format, talker=talker, code2wav=code2wav)
    if num_quantizers is not None and format != "mimi":
        raise UserError(f"num_quantizers={num_quantizers}: must be left out unless format=mimi")
    given = {"checkpoint": checkpoint, "talker": talker, "code2wav": code2wav}
    folders = {key: folder for key, folder in given.items() if folder is not None}
    if len({folder.absolute() for folder in folders.values()}) < len(folders):
        raise UserError(f"checkpoint={checkpoint}: must be another folder than talker= and code2wav=")
    _refuse_checkpoints(folders)
    sources = []
    for kind, folder in ((format, checkpoint), (_TALKER, talker)):
        if folder is not None and kind not in speech_convert.FORMATS:
            source = _source(kind, hf)
            sources.append((source, source.recipe(parallel or ParallelConfig()), folder))
    held = holding(*folders.values(), remedy=_ELSEWHERE, when_held=lambda: _refuse_checkpoints(folders))
    with platform.joined(), held:
        for source, recipe, folder in sources:
            importing.write_checkpoint(source, recipe, folder)
        if format in speech_convert.FORMATS:
            speech_convert.import_speech(format, hf, checkpoint, num_quantizers)
        if code2wav is not None:
            speech_convert.import_speech("qwen3_omni_code2wav", hf, code2wav)


def export_checkpoint(
    format: str,
    hf: Path,
    checkpoint: Path,
    max_file_gigabytes: float = 5.0,
    talker: Path | None = None,
    code2wav: Path | None = None,
) -> None:
    """Write a Hugging Face folder from a checkpoint of any layout.

    Tensors have the types, and the files beside them the content, of the folder that the checkpoint once came from. One
    that never did gives its own types and a config.json made from its model. Under a launcher the ranks share the work.

    Args:
        format: qwen3_5_moe, qwen3_5 (dense) or qwen3_omni_moe; qwen3_omni_talker (the Talker's part of a Qwen3-Omni's
            folder) or omni_talker (a Talker of any kind, in a folder that omni_train alone reads); of speech, mimi or
            qwen3_omni_code2wav.
        hf: folder to write; it must not hold a model yet.
        checkpoint: a step_XXXXXXXX folder, or a run's (its latest).
        max_file_gigabytes: size of one safetensors file; what is carried along keeps the files that it came in. Memory
            for one file and its largest tensor is needed.
        talker: with format=qwen3_omni_moe, the checkpoint of the Talker; without it the Talker is as it was imported.
        code2wav: the same for Code2Wav, from a checkpoint of network=code2wav or network=codec.

    Raises:
        UserError: a checkpoint is damaged, not of this format, lacks a tensor or has one too many; they do not belong
            together; or `hf` holds a model already.
    """
    _check_format(format, talker=talker, code2wav=code2wav)
    _refuse_tensors(hf)
    with platform.joined(), holding(hf, remedy=_ELSEWHERE, when_held=lambda: _refuse_tensors(hf)):
        if format in speech_convert.FORMATS:
            speech_convert.export_speech(format, hf, checkpoint)
            return
        max_bytes = int(max_file_gigabytes * 1e9)
        if format == _TALKER:
            export = exporting.talker_folder(checkpoint, max_bytes)
        elif format == _OWN_TALKER:
            export = exporting.own_talker_folder(checkpoint, max_bytes)
        else:
            export = exporting.thinker_folder(format, checkpoint, talker, code2wav, max_bytes)
        write_files(export.files, hf, platform.rank(), platform.world_size())
        torch.distributed.barrier()
        if platform.rank() == 0:
            tensors = write_index(export.files, hf)
            export.write_side_files(hf)
            say(f"exported {tensors} tensors from {export.written.path} to {hf}")


def _source(format: str, hf: Path) -> importing.Source:
    if format == _TALKER:
        return importing.talker_source(hf)
    if format == _OWN_TALKER:
        return importing.own_talker_source(hf)
    return importing.thinker_source(format, hf)


def _check_format(format: str, **parts: Path | None) -> None:
    known = [*FAMILIES, _TALKER, _OWN_TALKER, *speech_convert.FORMATS]
    if format not in known:
        raise UserError(f"format={format}: unknown; choose one of {', '.join(known)}")
    for key, path in parts.items():
        if path is not None and format != _OMNI:
            raise UserError(f"{key}={path}: must be left out unless format={_OMNI}")


def _refuse_checkpoints(folders: dict[str, Path]) -> None:
    for key, folder in folders.items():
        if holds_checkpoints(folder):
            raise UserError(f"{key}={folder}: there is a checkpoint already; {_ELSEWHERE}")


def _refuse_tensors(hf: Path) -> None:
    if any(hf.glob("*.safetensors")):
        raise UserError(f"hf={hf}: there are safetensors files already; {_ELSEWHERE}")
