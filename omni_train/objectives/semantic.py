"""What codebook 0 learns to mean: a teacher's features of the same speech, brought to the frames of the codes.

Axis letters: B crops, T frames of the teacher, K frames of codes, D width of the teacher's features.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
import torch.nn.functional as F

from omni_train.errors import UserError, first_line
from omni_train.platform.unpickling import tensors_and

TEACHER_SAMPLING_RATE = 16000
"""Hz, of what every teacher hears."""


class Teacher(Protocol):
    """Whoever knows what is said.

    Attributes:
        rate: features a second.
        size: their width D.
    """

    rate: float
    size: int

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        """Features (B, T, D) of waveforms (n,) of 16 kHz, without gradient; zeros, or anything, after a clip's end."""
        ...


class WavLMTeacher:
    """The last layer of a WavLM (Chen et al. 2022), Mimi's teacher.

    Args:
        folder: as ``transformers`` saves it.
        device: where it runs.

    Raises:
        UserError: ``transformers`` is not installed, or there is no WavLM in the folder.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        try:
            from transformers import WavLMConfig, WavLMModel
        except ImportError:
            raise UserError(
                f"codec_training.teacher={folder}: needs the package transformers; install it, or set teacher=null"
            ) from None
        try:
            written = json.loads((Path(folder) / "config.json").read_text())
            if (kind := written.get("model_type")) != "wavlm":
                raise UserError(f"codec_training.teacher={folder}: a {kind} model; give a folder of a WavLM model")
            # Only what describes the network: a configuration may also name a repository of kernels to fetch and run.
            known = WavLMConfig().to_dict().keys() | {"torch_dtype"}
            config = WavLMConfig.from_dict({key: value for key, value in written.items() if key in known})
            with tensors_and():
                self.model = WavLMModel.from_pretrained(folder, config=config, local_files_only=True)
            self.model.to(device).eval()
        except (OSError, ValueError, UnpicklingError) as error:
            raise UserError(
                f"codec_training.teacher={folder}: no WavLM model can be read here: {first_line(error)}"
            ) from None
        self.model.requires_grad_(False)
        preprocessor = Path(folder) / "preprocessor_config.json"
        self.normalize = preprocessor.exists() and json.loads(preprocessor.read_text()).get("do_normalize", True)
        self.masked = self.model.config.feat_extract_norm == "layer"  # the others were trained on zeros as they are
        self.rate = TEACHER_SAMPLING_RATE / prod(self.model.config.conv_stride)
        self.size = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        if self.normalize:
            waveforms = [F.layer_norm(waveform, waveform.shape, eps=1e-7) for waveform in waveforms]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        samples = max(int(lengths.max()), self.model.config.conv_kernel[0] * prod(self.model.config.conv_stride))
        padded = torch.stack([F.pad(waveform, (0, samples - len(waveform))) for waveform in waveforms])
        mask = (torch.arange(samples) < lengths[:, None]).long().to(padded.device) if self.masked else None
        return self.model(padded, attention_mask=mask).last_hidden_state


def to_frames(features_BTD: torch.Tensor, rate: float, frames: int, frame_rate: float) -> torch.Tensor:
    """Features (B, K, D) of ``frames`` frames of codes.

    A teacher that is faster than the codes is averaged over each frame of theirs (Mimi's average pooling); a slower one
    is interpolated between the middles of its own.
    """
    steps = features_BTD.shape[1]
    if rate >= frame_rate:
        edges = torch.arange(frames + 1) * rate / frame_rate  # in frames of the teacher
        begin, end = edges[:-1, None], edges[1:, None]
        step = torch.arange(steps)
        weights_KT = (torch.minimum(end, step + 1) - torch.maximum(begin, step)).clamp_min(0)
        beyond = weights_KT.sum(1) == 0  # convolutions without padding end some frames early
        weights_KT[beyond, -1] = 1
    else:
        middles = ((torch.arange(frames) + 0.5) * rate / frame_rate - 0.5).clamp(0, steps - 1)
        weights_KT = (1 - (middles[:, None] - torch.arange(steps)).abs()).clamp_min(0)
    weights_KT = (weights_KT / weights_KT.sum(1, keepdim=True)).to(features_BTD)
    return weights_KT @ features_BTD


def cosine_distance(student_BKD: torch.Tensor, teacher_BKD: torch.Tensor, heard_BK: torch.Tensor) -> torch.Tensor:
    """1 minus the cosine of the angle between the two, mean (B,) over the frames where ``heard_BK`` is True."""
    distance_BK = 1 - F.cosine_similarity(student_BKD.float(), teacher_BKD.float(), dim=2)
    return (distance_BK * heard_BK).sum(1) / heard_BK.sum(1)
