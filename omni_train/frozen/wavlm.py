"""WavLM as the teacher of codebook 0."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F

from omni_train.errors import UserError, first_line
from omni_train.objectives.semantic import TEACHER_SAMPLING_RATE
from omni_train.platform.unpickling import tensors_and


class WavLM:
    """Outputs of the last layer of a WavLM (Chen et al. 2022), which is also Mimi's teacher.

    Args:
        folder: folder of the model as ``transformers`` saves it.
        device: device that the model runs on.

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
        self.masked = self.model.config.feat_extract_norm == "layer"  # others were trained on zeros without a mask
        self.rate = TEACHER_SAMPLING_RATE / prod(self.model.config.conv_stride)
        self.size = self.model.config.hidden_size

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules that hold WavLM's weights."""
        return [self.model]

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        if self.normalize:
            waveforms = [F.layer_norm(waveform, waveform.shape, eps=1e-7) for waveform in waveforms]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        samples = max(int(lengths.max()), self.model.config.conv_kernel[0] * prod(self.model.config.conv_stride))
        padded = torch.stack([F.pad(waveform, (0, samples - len(waveform))) for waveform in waveforms])
        mask = (torch.arange(samples) < lengths[:, None]).long().to(padded.device) if self.masked else None
        return self.model(padded, attention_mask=mask).last_hidden_state


def is_wavlm(teacher: str) -> bool:
    """Whether a path is a model folder of ``transformers``: it has a ``config.json``, as no checkpoint or run has."""
    return Path(teacher, "config.json").exists()
