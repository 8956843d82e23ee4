"""Which token comes next.

Axis letters: N sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from a model's distribution.

    Raises:
        ValueError: a figure out of its range.
    """

    temperature: float = 0.0  # 0: always the likeliest
    top_p: float = 1.0  # of the likeliest tokens, as few as hold this much probability
    top_k: int = 0  # of the k likeliest; 0 of all

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"{self}: temperature and top_k are at least 0, top_p is above 0 and at most 1")

    def choose(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
        """A token for each sequence.

        Args:
            logits_NV: of the model.
            uniform_N: a number from [0, 1) for each sequence: which quantile of its distribution is drawn.

        Returns:
            (N,) int64.
        """
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        size = min(self.top_k or logits_NV.shape[1], logits_NV.shape[1])
        logits, tokens = logits_NV.topk(size)  # from the likeliest on
        probabilities = (logits.double() / self.temperature).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        upto = torch.where(before < self.top_p, probabilities, 0).cumsum(-1)
        quantile = uniform_N.to(upto)[:, None] * upto[:, -1:]
        drawn = torch.searchsorted(upto, quantile, right=True).clamp(max=size - 1)
        return tokens.gather(1, drawn)[:, 0]


def uniforms(seed: int, prompt: int, count: int) -> np.ndarray:
    """(count,) numbers from [0, 1) that depend on nothing but the seed and the number of the prompt."""
    return np.random.default_rng([seed, prompt]).random(count)
