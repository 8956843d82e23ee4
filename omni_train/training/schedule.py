"""Length of a run, and its learning rate at each step."""

from __future__ import annotations

import math

from omni_train.recipe.schema import Decay, OptimizerConfig, ScheduleConfig


class Schedule:
    """Progress and learning rate of a run, whose length is in steps, or in tokens where the recipe sets them."""

    def __init__(self, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> None:
        self.schedule, self.optimizer = schedule, optimizer

    def progress(self, step: int, tokens: int) -> float:
        """Fraction of the run done before the step numbered `step` (from 0), after `tokens` tokens."""
        if self.schedule.tokens:
            return min(1.0, max(tokens / self.schedule.tokens, step / self.schedule.steps))
        return min(1.0, step / self.schedule.steps)

    def done(self, step: int, tokens: int) -> bool:
        """Whether the run has reached its length."""
        return step >= self.schedule.steps or bool(self.schedule.tokens and tokens >= self.schedule.tokens)

    def learning_rate(self, step: int, tokens: int) -> float:
        """Learning rate of the step numbered `step` (from 0)."""
        config, peak, low = self.schedule, self.optimizer.lr, self.optimizer.min_lr
        progress = self.progress(step, tokens)
        if progress < config.warmup_fraction:
            # The step itself counts, so that the first one already has a learning rate above 0.
            after = self.progress(step + 1, tokens + (tokens // step if step else 0))
            return peak * min(1.0, max(after, 1 / config.steps) / config.warmup_fraction)
        rest = (progress - config.warmup_fraction) / max(1.0 - config.warmup_fraction, 1e-12)
        match config.decay:
            case Decay.constant:
                return peak
            case Decay.cosine:
                return low + 0.5 * (peak - low) * (1.0 + math.cos(math.pi * rest))
            case Decay.wsd:
                start = 1.0 - config.decay_fraction
                if progress <= start:
                    return peak
                return peak + (low - peak) * (progress - start) / config.decay_fraction
        raise ValueError(f"unknown decay {config.decay}")
