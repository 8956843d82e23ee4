"""Export of Megatron networks: which tensors of which checkpoints a Hugging Face folder gets, and its ``config.json``.

No model is built: tensors are read from the checkpoint, whatever layout wrote it, for one file of the folder at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.sharded import read_model_config
from omni_train.checkpoint.store import resolve
from omni_train.errors import UserError
from omni_train.interop.config import from_hugging_face, merged, to_hugging_face
from omni_train.interop.families import FAMILIES
from omni_train.interop.folder import read_json, tensor_bytes
from omni_train.interop.importing import TENSORS, thinker_table, whole
from omni_train.interop.rows import TensorMap
from omni_train.interop.speech import CODE2WAV, code2wav_parts
from omni_train.interop.speech_config import code2wav_from_hugging_face, code2wav_to_hugging_face
from omni_train.interop.speech_convert import read_code2wav_checkpoint
from omni_train.interop.talker_config import EXTRAS, talker_from_hugging_face, talker_to_hugging_face
from omni_train.interop.talker_folder import talker_config
from omni_train.interop.talker_tensors import TALKER, TEXT_TABLE, own_map, talker_map
from omni_train.interop.writer import CheckpointReader, File, plan_files
from omni_train.platform.agreement import on_first_rank
from omni_train.recipe.schema import ModelConfig, Verify, required


class Written:
    """A sharded checkpoint, and what it keeps of the folder that it once came from. Collective.

    Args:
        path: a step_XXXXXXXX folder, or a run's (its latest).

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = resolve(path)
        require_intact(self.path, Verify.all)
        self.model = read_model_config(self.path)
        self.reader = CheckpointReader(self.path)
        self.carried = self.path / "hf"
        self.dtypes: dict[str, torch.dtype] = {}
        self.original: dict[str, Any] | None = None
        if self.carried.is_dir():
            types = {name: getattr(torch, str(kind), None) for name, kind in read_json(self.carried / TENSORS).items()}
            if not all(isinstance(dtype, torch.dtype) for dtype in types.values()):
                raise UserError(f"{self.carried / TENSORS}: not the types of tensors; import the folder again")
            self.dtypes, self.original = types, read_json(self.carried / "config.json")

    def files(self, table: TensorMap, max_bytes: int, without: tuple[str, ...] = ()) -> list[File]:
        """Files of the tensors of a table, those of ours that are named left out.

        Raises:
            UserError: the checkpoint is not exactly what the table writes.
        """
        self.reader.check(table)
        table = {name: parts for name, parts in table.items() if name not in without}
        return plan_files(self.reader, table, self.dtypes, max_bytes)


@dataclass
class Folder:
    """Folder to write: its tensors, its ``config.json``, and the checkpoint whose other files it gets."""

    files: list[File]
    config: dict[str, Any]
    written: Written

    def write_side_files(self, hf: Path) -> None:
        """Write the tokenizer and other files as they were imported, and config.json, to the byte where it is the
        original's."""
        if self.written.carried.is_dir():
            for file in self.written.carried.iterdir():
                if file.name != TENSORS and file.suffix != ".safetensors":
                    shutil.copy(file, hf)
        if self.config != self.written.original:
            (hf / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def thinker_folder(format: str, checkpoint: Path, talker: Path | None, code2wav: Path | None, max_bytes: int) -> Folder:
    """Folder of one of the families. Talker and Code2Wav are those of the checkpoints that are named, else those that
    the Thinker's checkpoint carries. Collective.

    Raises:
        UserError: a checkpoint is damaged or not of this format, or they do not belong together.
    """
    family, written = FAMILIES[format], Written(checkpoint)
    table = thinker_table(family, written.model, written.dtypes)
    files = written.files(table, max_bytes)
    config = _thinker_config(format, written, _dtype(files))
    replaced: tuple[str, ...] = ()
    if talker is not None:
        speaks = Written(talker)
        section = _talker_section(speaks, config)
        _check_thinker(written, speaks)
        files += speaks.files(talker_map(required(speaks.model.talker), speaks.dtypes), max_bytes, (TEXT_TABLE,))
        config, replaced = {**config, "talker_config": section}, (TALKER,)
    if code2wav is not None:
        sizes, state, original = read_code2wav_checkpoint(code2wav)
        section = _code2wav_section(code2wav_to_hugging_face(sizes), original)
        files.append({**code2wav_parts(sizes, state)})
        config, replaced = {**config, "code2wav_config": section}, (*replaced, CODE2WAV)
    files += _carried(written.carried, replaced)
    if replaced:
        config = _that_speaks(config, files)
    return Folder(files, config, written)


def talker_folder(checkpoint: Path, max_bytes: int) -> Folder:
    """Folder of a Talker in a Qwen3-Omni's names, with the Thinker's table of the text. Collective.

    Raises:
        UserError: the checkpoint is damaged, or its Talker is not one of a Qwen3-Omni.
    """
    written = Written(checkpoint)
    talker = _required_talker(written)
    config = written.original if written.original and "thinker_config" in written.original else None
    if config is None:
        text = {"vocab_size": written.model.vocab_size, "hidden_size": talker.thinker_hidden_size}
        family = FAMILIES["qwen3_omni_moe"]
        config = {"model_type": family.model_type, "thinker_config": {"text_config": text}}
    config = {**config, "talker_config": _talker_section(written, config)}
    return Folder(written.files(talker_map(talker, written.dtypes), max_bytes), config, written)


def own_talker_folder(checkpoint: Path, max_bytes: int) -> Folder:
    """Folder of a Talker of any kind, in our own names. Collective.

    Raises:
        UserError: the checkpoint is damaged, or has no Talker.
    """
    written = Written(checkpoint)
    files = written.files(own_map(_required_talker(written)), max_bytes)
    return Folder(files, {**talker_config(written.model), "dtype": _dtype(files)}, written)


def _required_talker(written: Written):
    if written.model.talker is None:
        raise UserError(f"{written.path}: has no Talker; give a checkpoint of network=talker")
    return written.model.talker


def _dtype(files: list[File]) -> str:
    """Name of the type of the first tensor, which is the table of the text."""
    assert isinstance(files[0], dict)
    return str(next(iter(files[0].values())).dtype).removeprefix("torch.")


def _thinker_config(format: str, written: Written, dtype: str) -> dict[str, Any]:
    family, original = FAMILIES[format], written.original

    def to_theirs(model: ModelConfig) -> dict[str, Any]:
        return to_hugging_face(format, model, whole=whole(family, model, written.dtypes))

    config = to_theirs(written.model)
    if original is None:
        return merged({**config, "dtype": dtype}, family.config_extras)
    if to_theirs(from_hugging_face(format, original, "", written.dtypes)) == config:
        return original
    if "text_config" in config and "text_config" not in original:
        original = {"text_config": original}  # a language model that was given a vision encoder
    return merged({**config, "dtype": dtype}, original)


def _talker_section(written: Written, config: Mapping[str, Any]) -> dict[str, Any]:
    """``talker_config`` of a checkpoint, for a folder whose ``config.json`` is otherwise this one."""
    _required_talker(written)
    section, original = talker_to_hugging_face(written.model), written.original or {}
    if "talker_config" not in original:  # ids of tokens are all that it shares with another Talker
        merge = config.get("thinker_config", {}).get("vision_config", {}).get("spatial_merge_size")
        known = EXTRAS | ({"spatial_merge_size": merge} if merge else {})
        return {**known, **{k: v for k, v in config.get("talker_config", {}).items() if k in EXTRAS and v}, **section}
    if talker_to_hugging_face(talker_from_hugging_face(original, "")) == section:
        return original["talker_config"]
    return {**merged(section, original["talker_config"]), "speaker_id": section["speaker_id"]}


def _code2wav_section(section: dict[str, Any], original: Mapping[str, Any] | None) -> dict[str, Any]:
    section = {key: value for key, value in section.items() if key != "architectures"}
    if original is None or not (own := original.get("code2wav_config", original)):
        return section
    theirs = code2wav_to_hugging_face(code2wav_from_hugging_face(own))
    return own if theirs.items() >= section.items() else merged(section, own)


def _check_thinker(thinker: Written, talker: Written) -> None:
    """Refuse a Talker of another Thinker: their tables of the text differ."""
    wanted, layers = required(talker.model.talker), required(thinker.model.thinker)
    if 2 * wanted.accept_hidden_layer > len(layers.pattern.replace("|", "")) * layers.repeats:
        raise UserError(
            f"talker={talker.path}: reads layer {wanted.accept_hidden_layer} of the Thinker, and {thinker.path} has "
            "fewer; give the Thinker that it was trained with"
        )

    def compare() -> None:
        ours, theirs = talker.reader.read(TEXT_TABLE), thinker.reader.read(TEXT_TABLE)
        if ours.shape != theirs.shape or not torch.equal(theirs.to(ours.dtype), ours):
            raise UserError(
                f"talker={talker.path}: its table of the text is not that of {thinker.path}; give the Thinker that it "
                "was trained with"
            )

    on_first_rank(compare)


def _carried(folder: Path, replaced: tuple[str, ...]) -> list[File]:
    """Files of the tensors that a checkpoint carries, but those of parts that are replaced."""
    files: list[File] = []
    for file in sorted(folder.glob("*.safetensors")):
        names = tensor_bytes(file)
        if kept := [name for name in names if not name.startswith(replaced)] if replaced else [*names]:
            if len(kept) == len(names):
                files.append(file)
                continue
            with safe_open(file, framework="pt") as opened:
                files.append({name: opened.get_tensor(name) for name in kept})
    return files


def _that_speaks(config: dict[str, Any], files: list[File]) -> dict[str, Any]:
    """A ``config.json`` of a whole Qwen3-Omni, whose Talker and Code2Wav have to fit each other.

    Raises:
        UserError: one of the two is missing, or they differ in their codes.
    """
    names = {name for file in files for name in (tensor_bytes(file) if isinstance(file, Path) else file)}
    for key, prefix in (("talker", TALKER), ("code2wav", CODE2WAV)):
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{key}= is missing: a Qwen3-Omni that speaks has a Talker and a Code2Wav; name both")
    talker, code2wav = config["talker_config"], config["code2wav_config"]
    codes = (talker["num_code_groups"], talker["code_predictor_config"]["vocab_size"])
    if codes != (its := (code2wav["num_quantizers"], code2wav["codebook_size"])):
        raise UserError(
            f"code2wav={its[0]} codebooks of {its[1]}, the Talker has {codes[0]} of {codes[1]}; give the Code2Wav of "
            "its codes"
        )
    return config if config.get("enable_audio_output", True) else {**config, "enable_audio_output": True}
