"""``omni-train convert`` for speech networks: Hugging Face folders to whole-network checkpoints and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omni_train import platform
from omni_train.checkpoint.integrity import require_intact, write_digests
from omni_train.checkpoint.plain import read_network, write_networks
from omni_train.checkpoint.sharded import read_model_config
from omni_train.checkpoint.state_files import write_state
from omni_train.checkpoint.store import point_latest, resolve
from omni_train.errors import UserError
from omni_train.interop.folder import read_json
from omni_train.interop.speech import State, read_code2wav, read_mimi, write_code2wav, write_mimi
from omni_train.models.codec import SpeechCodec
from omni_train.platform.logs import say
from omni_train.recipe.schema import Code2WavConfig, ModelConfig, Verify, required

FORMATS = ("mimi", "qwen3_omni_code2wav")
_NETWORK = "generator"
"""Name of the network in checkpoints of training, beside the discriminators."""


def import_speech(format: str, hf: Path, checkpoint: Path, num_quantizers: int | None = None) -> None:
    """Write a checkpoint of one network from a Hugging Face folder: encoder and quantiser (mimi), or Code2Wav.

    Args:
        format: one of ``FORMATS``.
        hf: folder with config.json and safetensors files.
        checkpoint: folder to write step_00000000 into.
        num_quantizers: number of a Mimi's codebooks to take, from the first; None for all.

    Raises:
        UserError: the folder is not of this format.
    """
    if format == "mimi":
        config, state = read_mimi(hf, num_quantizers)
        model = {"codec": asdict(config)}
    else:
        config, state = read_code2wav(hf)
        model = {"code2wav": asdict(config)}
    if platform.rank() > 0:
        return
    final = checkpoint / "step_00000000"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "hf").mkdir(parents=True)
    shutil.copy(hf / "config.json", partial / "hf")
    write_networks(partial, {_NETWORK: state})
    write_state(partial / "model.pt", {"name": hf.resolve().name, **model})
    (partial / "metadata.json").write_text(json.dumps({"format": format}))
    write_digests(partial)
    partial.rename(final)
    point_latest(final)
    say(
        f"imported {len(state)} tensors from {hf}; start a run from them with init_from={checkpoint}, which says what "
        "has to start fresh beside them"
    )


def export_speech(format: str, hf: Path, checkpoint: Path) -> None:
    """Write a Hugging Face folder from a checkpoint of a codec or Code2Wav, with averaged weights where it has some.

    A codec's decoder becomes a Code2Wav, with the quantiser's codewords folded into its embedding.

    Args:
        format: one of ``FORMATS``.
        hf: folder to write.
        checkpoint: a step_XXXXXXXX folder, or a run's (its latest).

    Raises:
        UserError: the checkpoint is damaged, or lacks the network that the format needs.
    """
    if format == "mimi":
        model, state, original = _read(checkpoint)
        if not _encodes(state):
            raise UserError(f"checkpoint={checkpoint}: has no encoder; format=mimi needs one of network=codec")
        if platform.rank() == 0:
            write_mimi(hf, model.codec, state, original)
    else:
        code2wav, state, original = read_code2wav_checkpoint(checkpoint)
        if platform.rank() == 0:
            write_code2wav(hf, code2wav, state, original)
    if platform.rank() == 0:
        say(f"exported {checkpoint} to {hf}")


def read_code2wav_checkpoint(checkpoint: Path) -> tuple[Code2WavConfig, State, dict[str, Any] | None]:
    """Code2Wav of a checkpoint; a codec's decoder becomes one.

    Args:
        checkpoint: as of :func:`export_speech`.

    Returns:
        sizes, the state dict of ``Code2Wav(sizes)``, and the ``config.json`` of the folder that it once came from.

    Raises:
        UserError: the checkpoint is damaged, or has no Code2Wav.
    """
    model, state, original = _read(checkpoint)
    if _encodes(state):
        state = _folded(checkpoint, model, state)
    return required(model.code2wav), state, original


def _read(checkpoint: Path) -> tuple[ModelConfig, State, dict[str, Any] | None]:
    """Model, network and original ``config.json`` of a checkpoint."""
    checkpoint = resolve(checkpoint)
    only = ("model.pt", f"{_NETWORK}*.safetensors", "hf/config.json")
    require_intact(checkpoint, Verify.all, only, together=False)
    came_from = checkpoint / "hf" / "config.json"
    original = read_json(came_from) if came_from.exists() else None
    return read_model_config(checkpoint), read_network(checkpoint, _NETWORK), original


def _encodes(state: State) -> bool:
    return any(name.startswith("encoder.") for name in state)


def _folded(checkpoint: Path, model: ModelConfig, state: State) -> State:
    """State dict of the Code2Wav that a codec's decoder and codebooks make."""
    if not any(name.startswith("decoder.") for name in state):
        raise UserError(f"checkpoint={checkpoint}: has no decoder; format=qwen3_omni_code2wav needs one")
    codec = SpeechCodec(model.codec, model.code2wav)
    codec.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("teacher.")})
    return codec.to_code2wav().state_dict()
