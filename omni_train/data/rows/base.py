"""Rows, and the contract of their kinds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch

from omni_train.recipe.refusals import refuse
from omni_train.recipe.schema import DataConfig, EvaluationConfig, ModelConfig, Recipe

if TYPE_CHECKING:  # which reads files: who trains on rows need not
    from omni_train.data.samples.sample import Sample
    from omni_train.data.samples.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Row:
    """Row: one micro-batch of a data rank. Kinds of rows add tensors, a batch axis among their axes where they want.

    A row travels from the process that makes it to the ranks that train on it, so its class has to be one that they can
    import.
    """

    MEDIA: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that only ranks of the first pipeline stage need. Each has an empty default."""

    MODALITIES: ClassVar[Sequence[str]] = ()
    """Names of the modalities that its tokens are counted by."""

    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples refused since the stream's last row
    samples: int = 0  # that begin in this row
    # What the frozen models of an objective gave for this row, by name. It is made where it is used: a row that travels
    # leaves it behind.
    prepared: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"prepared": {}}

    def tokens_by_modality(self) -> torch.Tensor:
        """Tokens of each of ``MODALITIES``, padding excluded: (modalities,) float64."""
        return torch.zeros(len(self.MODALITIES), dtype=torch.float64)

    def without_media(self) -> Self:
        """Row as later pipeline stages have it, with empty ``MEDIA``."""
        return replace(self, **{spec.name: _empty(spec) for spec in fields(self) if spec.name in self.MEDIA})


def _empty(media: Field) -> Any:
    assert media.default_factory is not MISSING, f"{media.name} is among MEDIA without an empty default"
    return media.default_factory()


class Piece(Protocol):
    """Piece of a sample that packing never splits: a token sequence, a crop."""

    def __len__(self) -> int:
        """Length by which the sources are blended, in the unit of ``data.row_tokens``."""

    @property
    def media_bytes(self) -> int:
        """Memory of the piece's decoded media, in bytes."""


@dataclass(frozen=True)
class Reading:
    """Settings with which one sample is read.

    Attributes:
        tokenizer: tokenizer of the recipe.
        data: data of the recipe.
        model: model of the recipe.
        seed: seed of the run; None where nothing is drawn, as for held-out samples.
        key: key of the sample and the epoch: another one at every reading, the same one in a stream that was restored.
    """

    tokenizer: Tokenizer
    data: DataConfig
    model: ModelConfig
    seed: int | None = None
    key: tuple = ()

    @property
    def draw(self) -> int:
        """Random number of this reading, from 0 to below 2^63, for all that is drawn at random."""
        digest = hashlib.blake2b(repr((self.seed, self.key)).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


class RowKind(ABC):
    """Kind of rows, which ``data.rows`` names.

    Attributes:
        name: name of the kind in recipes.
        row: class of the rows.
        augmented: whether ``data.augmentation`` has a meaning.
    """

    name: str
    row: type[Row]
    augmented: bool = False

    @abstractmethod
    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> Sequence[Piece]:
        """Pieces of a sample.

        Args:
            sample: the sample.
            parts: name -> bytes of the files beside its ``key.json``.
            reading: settings with which it is read.

        Raises:
            SampleError: the sample is refused; its reason is counted.
        """

    @abstractmethod
    def row_maker(self, tokenizer: Tokenizer, data: DataConfig) -> Callable[[list], Row]:
        """Function that makes a row of the pieces chosen for it, whose lengths sum to the bounds at most."""

    def bounds(self, data: DataConfig) -> tuple[int, ...]:
        """Lengths of a row, each of which bounds one of the lengths of its pieces."""
        return (data.row_tokens,)

    def lengths(self, piece: Any, data: DataConfig) -> tuple[int, ...]:
        """Lengths of a piece, which takes up as much of a row's, rounded up to ``data.alignment``."""
        return (len(piece),)

    @abstractmethod
    def held_out(
        self,
        data: DataConfig,
        model: ModelConfig,
        evaluation: EvaluationConfig,
        *,
        split: str = "val",
        data_rank: int = 0,
        data_world_size: int = 1,
        refused: Counter[str] | None = None,
    ) -> list:
        """This rank's share of an evaluation's held-out data, from the first ``evaluation.samples`` of each source.

        The same at every call, and all ranks' shares together are the same for any number of ranks; what cannot be read
        is left out.

        Args:
            split: split of the sources.
            data_rank: this data rank.
            data_world_size: number of data ranks.
            refused: counter of the samples that cannot be read, by reason; over all ranks each sample counts once.

        Raises:
            UserError: no sample can be read, or the split is missing.
        """

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose keys do not fit these rows, before anything is read.

        Raises:
            UserError: the first thing found, in one line.
        """
        if recipe.data.augmentation is not None and not self.augmented:
            refuse(recipe, "data.augmentation", f"data.rows={self.name} are read as they are; set null")

    def warning(self, data: DataConfig) -> str | None:
        """Warning to give before a run begins to read; None without one.

        Raises:
            UserError: the data cannot work for certain.
        """
        return None
