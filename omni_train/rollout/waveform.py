"""Frames of codes to a waveform while they come, in pieces that add up to what the whole would give.

Axis letters: Q codebooks, n frames, S samples.
"""

from __future__ import annotations

import numpy as np
import torch

from omni_train.models.code2wav import Code2Wav
from omni_train.nn.waveform import StreamingState


class WaveStream:
    """Waveform of one sequence of frames, synthesized whenever there are `frames` new ones.

    Its memory does not grow: of what came before it keeps the left context of convolutions and attention's window.

    Args:
        code2wav: in evaluation mode, on its device.
        frames: frames of a piece. One is heard soonest, more are less work.

    Raises:
        ValueError: `frames` is below 1.
    """

    def __init__(self, code2wav: Code2Wav, frames: int = 1) -> None:
        if frames < 1:
            raise ValueError(f"frames={frames}: must be at least 1")
        self.code2wav, self.frames = code2wav, frames
        self.state: StreamingState = {}
        self._waiting: list[np.ndarray] = []

    def add(self, codes: np.ndarray) -> np.ndarray:
        """Samples (S,) float32 that one more frame of codes (Q,) brings, none while a piece is not full."""
        self._waiting.append(codes)
        return self.end() if len(self._waiting) == self.frames else np.zeros(0, np.float32)

    @torch.no_grad()
    def end(self) -> np.ndarray:
        """Samples (S,) of the frames that wait for others."""
        if not self._waiting:
            return np.zeros(0, np.float32)
        codes_Qn = np.stack(self._waiting, axis=1)
        self._waiting = []
        device = self.code2wav.embedding.weight.device
        return self.code2wav(torch.from_numpy(codes_Qn)[None].to(device), self.state)[0].float().cpu().numpy()
