"""Held-out samples, shared among data ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import PurePath

from omni_train.data.samples.sample import Sample, SampleError, one_sample
from omni_train.data.samples.sources import first_samples, open_sources
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, EvaluationConfig


def held_out_share[Held](
    wanted: Callable[[Sample], bool],
    read: Callable[[str, Sample, Mapping[str, bytes]], Held],
    what: str,
    data: DataConfig,
    evaluation: EvaluationConfig,
    *,
    split: str = "val",
    data_rank: int = 0,
    data_world_size: int = 1,
    refused: Counter[str] | None = None,
) -> list[Held]:
    """This rank's share of the wanted ones among the first ``evaluation.samples`` samples of each source.

    The same at every call, and all ranks' shares together are the same for any number of ranks; what cannot be read is
    left out.

    Args:
        wanted: whether a sample is one of them.
        read: function of a sample's name, the sample and its files.
        what: what they are called where there are none.
        refused: counter of the samples that cannot be read, by reason; over all ranks each sample counts once.

    Raises:
        UserError: there are none, or the split is missing.
    """
    found: list[Held] = []
    refused = Counter() if refused is None else refused
    unread = refused if data_rank == 0 else Counter()  # which every rank finds
    number = 0
    for source, folder in zip(data.sources, open_sources(data, split, training=False), strict=True):
        for index, sample, files in first_samples(folder, evaluation.samples, unread):
            if not wanted(sample):
                continue
            number += 1
            if number % data_world_size == (data_rank + 1) % data_world_size:
                try:
                    with one_sample():
                        found.append(read(f"{PurePath(source.path).name}/{index}", sample, files()))
                except SampleError as error:
                    refused[error.reason] += 1
    if not number:  # on every rank alike
        raise UserError(
            f"evaluation.every={evaluation.every}: no {what} among the first {evaluation.samples} samples of the "
            f"{split} split of each source; put {what} there, raise evaluation.samples, or set evaluation.every=0"
        )
    return found
