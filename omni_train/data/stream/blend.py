"""Blend of sources: which one gives the next sequence, so that the recipe's weights are shares of the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.energon import SavableDataset
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.wrappers.base import BaseWrapperDataset

from omni_train.data.rows.base import Piece
from omni_train.data.samples.sample import describe
from omni_train.data.samples.strata import PASSED_OVER, left_out_reasons
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig

HOPELESS_SAMPLES = 1000  # of one source, refused one after the other
HOPELESS_PASSES = 3  # over one source's share, of which data.strata leave out every sample


@dataclass
class Tokenized:
    """Sequence to be packed, or the reason why a sample has none."""

    __restore_key__: tuple
    sequence: Piece | None = None
    refused: str | None = None
    stratum: str | None = None  # of the sample that begins with this sequence


class TokenBlend(BaseWrapperDataset):
    """Stream of the sequences of all sources, each giving tokens in proportion to its weight, however long they are.

    The source that lags most gives the next sequence: every source has a clock that a sequence advances by its tokens
    divided by the weight, and the earliest clock is next. This is weighted fair queueing (Demers, Keshav and Shenker,
    1989): at any moment the shares are off by no more than a sequence or so of each source, and nothing is random.
    Refused samples do not move the clock. A source that ends (only where samples are not repeated) or has no sample in
    this stream leaves its share to the others.

    Iterating raises UserError when one source has ``HOPELESS_SAMPLES`` refused in a row, or when the strata leave out
    ``HOPELESS_PASSES`` times what it has here.
    """

    _savable_fields = ("_clocks", "_refused")

    def __init__(self, datasets: Sequence[SavableDataset], data: DataConfig, *, worker_config):
        super().__init__(datasets, worker_config=worker_config)
        self.sources, self.meant = data.sources, set(left_out_reasons(data.strata))
        # A sample may wait in the shuffle buffer for some times its size.
        self.patience = [
            HOPELESS_SAMPLES + HOPELESS_PASSES * (dataset.len_worker() + 3 * data.shuffle_buffer)
            for dataset in datasets
        ]
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._clocks = [0.0] * len(self.sources)  # tokens / weight; infinite for a source that has ended
        self._refused: list[dict[str, int]] = [{} for _ in self.sources]  # by reason, since the last that was not

    def __iter__(self) -> Iterator[Tokenized]:
        iterators = [iter(dataset) if dataset.worker_has_samples() else iter(()) for dataset in self.datasets]
        while (earliest := min(self._clocks)) < math.inf:
            chosen = self._clocks.index(earliest)
            item = next(iterators[chosen], None)
            if item is None:
                self._clocks[chosen] = math.inf
                continue
            self._count(chosen, item)
            yield item if len(iterators) == 1 else add_sample_restore_key(item, chosen, src=self)

    def _count(self, chosen: int, item: Tokenized) -> None:
        refused = self._refused[chosen]
        if item.sequence is not None:
            self._clocks[chosen] += len(item.sequence) / self.sources[chosen].weight
            refused.clear()
            return
        if item.refused == PASSED_OVER:  # the source has samples, then
            refused.clear()
            return
        refused[item.refused] = refused.get(item.refused, 0) + 1
        left_out = sum(number for reason, number in refused.items() if reason in self.meant)
        if sum(refused.values()) - left_out >= HOPELESS_SAMPLES or left_out >= self.patience[chosen]:
            raise UserError(
                f"data.sources: {sum(refused.values()):,} samples in a row of {self.sources[chosen].path} were refused "
                f"({describe(refused)}); mend the shards, widen data.strata, or leave the source out"
            )

    def len_worker(self, worker_idx: int | None = None) -> int:
        return sum(dataset.len_worker(worker_idx) for dataset in self.datasets)

    def config(self) -> dict:
        return {"type": type(self).__qualname__, "datasets": [dataset.config() for dataset in self.datasets]}
