"""Contexts of the samples of a shard: what the Thinker reads of each, and where its states are taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import STATES, before_and_text, planner_of
from omni_train.data.rows.speech_context import Context, context_positions
from omni_train.data.rows.speech_plans import Planner
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import SampleError, one_sample
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.copying import Parts, samples_of
from omni_train.recipe.schema import DataConfig, ModelConfig


@dataclass
class Read:
    """Sample of a shard.

    Attributes:
        key: its key.
        parts: its files by their names.
        reason: why it has no context, where it cannot be read.
        sequence: the Thinker's, None where no state is read.
        positions: (K,) in it, of the states that are read.
    """

    key: str
    parts: Parts
    reason: str | None = None
    sequence: TokenSequence | None = None
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_bytes(self) -> int:
        """Memory of its files and of its decoded media, in bytes."""
        media = 0 if self.sequence is None else self.sequence.media_bytes
        return media + sum(map(len, self.parts.values()))


@dataclass
class Reader:
    """Reader of shards with the settings of a recipe, which is pickled to other processes as these."""

    data: DataConfig
    model: ModelConfig

    @cached_property
    def planner(self) -> Planner:
        return planner_of(Tokenizer(self.data.tokenizer), self.data, self.model)

    def samples(self, shard: Path, left_out: Counter[str]) -> Iterator[Read]:
        """Samples of a shard in order; ``left_out`` counts those that training would refuse for their files."""
        limits = self.data.max_sample_bytes, self.data.max_text_bytes
        for key, parts in samples_of(shard, *limits, left_out, without=[STATES]):
            yield self.read(key, parts)

    def read(self, key: str, parts: Parts) -> Read:
        """Sample of these files, with its context."""
        try:
            with one_sample():
                context = self._context(parts)
        except SampleError as error:
            return Read(key, parts, error.reason)
        return Read(key, parts, None, context.sequence, context.positions)

    def _context(self, parts: Parts) -> Context:
        sample = sample_in(parts)
        if sample.speech is None:
            raise SampleError("no_speech")
        before, _ = before_and_text(sample, self.data.chat_template)
        return context_positions(before, self.planner, self.data, self.model, parts)
