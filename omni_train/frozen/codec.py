"""The codec of a checkpoint: its codes of speech, and the content hash that says which codec made them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.plain import is_plain, read_network
from omni_train.checkpoint.sharded import read_model_config
from omni_train.checkpoint.store import resolve
from omni_train.data.rows.codes import MAX_SECONDS, content_hash, is_hash
from omni_train.errors import UserError
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from omni_train.recipe.schema import DataConfig, ModelConfig, Verify, required


class OpenCodec:
    """A trained codec that encodes speech.

    Args:
        codec: the codec in evaluation mode, in fp32, on its device.
    """

    def __init__(self, codec: SpeechCodec) -> None:
        self.codec = codec
        self.sampling_rate = codec.config.sampling_rate
        # The codes do not depend on the projection to the teacher's features.
        tensors = {name: tensor for name, tensor in codec.state_dict().items() if not name.startswith("teacher.")}
        decoder = None if codec.code2wav is None else asdict(codec.code2wav)
        self.content_hash = content_hash(tensors, {"codec": asdict(codec.config), "code2wav": decoder})

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Codes (N, frames) of a waveform (n,) float32 at the codec's sampling rate."""
        device = next(self.codec.parameters()).device
        return self.codec.encode(torch.from_numpy(waveform)[None].to(device))[0].cpu().numpy()


def open_codec(path: str) -> OpenCodec:
    """The codec of a checkpoint, or of a run's latest, with the averaged weights where it has some, as in evaluation.

    An imported Mimi has no decoder here, and encodes all the same.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it holds another network.
    """
    model, tensors = read_codec(path)
    if not any(name.startswith("encoder.") for name in tensors):
        raise UserError(f"codec={path}: a Code2Wav without an encoder; give a checkpoint of network=codec")
    return OpenCodec(_codec(model, tensors))


def open_code2wav(path: str) -> tuple[Code2Wav, OpenCodec | None]:
    """The Code2Wav of a checkpoint of network=code2wav, or that of a codec's decoder, and the codec where it is one.

    In fp32, with the averaged weights where there are some.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it decodes nothing.
    """
    model, tensors = read_codec(path)
    if model.code2wav is None or not any(name.startswith("decoder.") for name in tensors):
        raise UserError(
            f"codec={path}: encodes speech and decodes none; give a checkpoint of network=codec or code2wav"
        )
    return code2wav_of(model, tensors)


def code2wav_of(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> tuple[Code2Wav, OpenCodec | None]:
    """The Code2Wav that a checkpoint's model and tensors hold; see :func:`open_code2wav`."""
    if any(name.startswith("encoder.") for name in tensors):
        codec = _codec(model, tensors)
        return codec.to_code2wav(), OpenCodec(codec)
    code2wav = Code2Wav(required(model.code2wav)).float()
    code2wav.load_state_dict(tensors)
    return code2wav.eval(), None


def read_codec(path: str, key: str = "codec") -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Model and tensors of a checkpoint of network=codec or code2wav, or of a run's latest, averaged where it has
    averages.

    Args:
        path: checkpoint, or run.
        key: what names it.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it holds another network.
    """
    checkpoint = resolve(path)
    require_intact(checkpoint, Verify.all, only=("model.pt", "generator*.safetensors"), together=False)
    model = read_model_config(checkpoint)
    if not is_plain(checkpoint) or (model.codec is None and model.code2wav is None):
        raise UserError(f"{key}={path}: no codec in this checkpoint; give one of network=codec")
    return model, read_network(checkpoint, "generator")


def _codec(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> SpeechCodec:
    """Codec with these tensors, in fp32 and in evaluation mode."""
    decodes = any(name.startswith("decoder.") for name in tensors)
    teacher = tensors.get("teacher.weight")
    codec = SpeechCodec(
        required(model.codec), model.code2wav if decodes else None, 0 if teacher is None else len(teacher)
    ).float()
    codec.load_state_dict(tensors)
    return codec.eval()


def codec_hash(codec: str) -> str:
    """Content hash of the codec that ``data.codec`` names, by a hash already or by a checkpoint."""
    return codec if is_hash(codec) else open_codec(codec).content_hash


def write_codes(
    data: Path,
    codec: str,
    out: Path | None = None,
    workers: int = 0,
    max_seconds: float = MAX_SECONDS,
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
    samples: int = 0,
) -> None:
    """Copy the shards of a folder, with a codec's codes beside the speech of every sample.

    Every sample whose speech can be read (its speech target, else the first sound of the chat) gets ``key.codes.npy``,
    (codebooks, frames) uint16, and one with a reference utterance of its voice ``key.voice.codes.npy``. The same folder
    and codec give the same shards, whatever the number of processes. Stopped at any moment, the same command goes on
    where it was. The new folder is ready for ``data.codec=CHECKPOINT``, which refuses codes of another codec.

    Args:
        data: folder of indexed shards; it stays as it is.
        codec: checkpoint directory of the codec, or a run directory.
        out: folder of the new shards; data with `_codes` after its name.
        workers: processes that work side by side; 0 for one per core.
        max_seconds: longer speech is kept without codes (`audio_too_long`).
        max_sample_bytes: samples of more bytes are left out, as `data.max_sample_bytes` refuses them.
        max_text_bytes: samples whose ``key.json`` has more bytes are left out, as `data.max_text_bytes` refuses them.
        samples: samples that are taken of each shard, from its first; 0 for all.

    Raises:
        UserError: no shards, no codec, or `out` holds something else.
    """
    from omni_train.data_pipelines.codes import extract

    extract(data, codec, open_codec, out, workers, max_seconds, max_sample_bytes, max_text_bytes, samples)
