"""Sampling of the next token.

Axis letters: N sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: temperature, top-k, and then nucleus sampling (top-p, Holtzman et al. 2020).

    Raises:
        ValueError: a parameter out of its range.
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the fewest most probable tokens that hold this much probability
    top_k: int = 0  # sample from the k most probable tokens; 0 from all

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"{self}: temperature and top_k must be at least 0, top_p above 0 and at most 1")

    def choose(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
        """Next token of each sequence.

        Args:
            logits_NV: logits of the next tokens.
            uniform_N: a number from [0, 1) for each sequence, the quantile of its distribution that is drawn.

        Returns:
            (N,) int64 token ids.
        """
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        size = min(self.top_k or logits_NV.shape[1], logits_NV.shape[1])
        logits, tokens = logits_NV.topk(size)  # in descending order
        probabilities = (logits.double() / self.temperature).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        upto = torch.where(before < self.top_p, probabilities, 0).cumsum(-1)
        quantile = uniform_N.to(upto)[:, None] * upto[:, -1:]
        drawn = torch.searchsorted(upto, quantile, right=True).clamp(max=size - 1)
        return tokens.gather(1, drawn)[:, 0]


def uniforms(seed: int, prompt: int, count: int) -> np.ndarray:
    """Uniform numbers from [0, 1) that depend on nothing but the seed and the prompt.

    Args:
        seed: of the run.
        prompt: index of the prompt.
        count: how many.

    Returns:
        (count,) float64.
    """
    return np.random.default_rng([seed, prompt]).random(count)
