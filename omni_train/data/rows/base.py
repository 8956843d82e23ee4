"""What a kind of row has to say, and what is known of every row."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch

from omni_train.recipe.refusals import refuse
from omni_train.recipe.schema import DataConfig, EvaluationConfig, ModelConfig, Recipe

if TYPE_CHECKING:  # which reads files: who trains on rows need not
    from omni_train.data.samples.sample import Sample
    from omni_train.data.samples.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Row:
    """One micro-batch of a data rank. Kinds of rows add their tensors; a batch axis is theirs as well.

    A row travels from the process that makes it to the ranks that train on it, so its class has to be one that they can
    import.
    """

    MEDIA: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that only ranks of the first pipeline stage need. Each has an empty default."""

    MODALITIES: ClassVar[tuple[str, ...]] = ()
    """What its tokens are told apart by."""

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
        """The row as the later pipeline stages have it: ``MEDIA`` are empty."""
        return replace(self, **{spec.name: spec.default_factory() for spec in fields(self) if spec.name in self.MEDIA})


class Piece(Protocol):
    """What of a sample lies in a row as a whole."""

    def __len__(self) -> int:
        """Room that it takes, in the unit of ``data.row_tokens``."""

    @property
    def media_bytes(self) -> int:
        """Memory of what was decoded for it."""


@dataclass(frozen=True)
class Reading:
    """What a sample is read with.

    Attributes:
        seed: of the run; None where nothing is drawn, as for held-out samples.
        key: of the sample and the epoch: another one at every reading, the same one in a stream that was restored.
    """

    tokenizer: Tokenizer
    data: DataConfig
    model: ModelConfig
    seed: int | None = None
    key: tuple = ()

    @property
    def draw(self) -> int:
        """A number from 0 to below 2^63 for this one reading, whatever is random about it."""
        digest = hashlib.blake2b(repr((self.seed, self.key)).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


class RowKind(ABC):
    """What the rows of a run are made of, ``data.rows`` by name.

    Attributes:
        name: in recipes.
        row: class of the rows.
        augmented: whether ``data.augmentation`` means something.
    """

    name: str
    row: type[Row]
    augmented: bool = False

    @abstractmethod
    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> Sequence[Piece]:
        """The pieces of a sample whose files are ``parts``.

        Raises:
            SampleError: the sample has none; its reason is counted.
        """

    @abstractmethod
    def row_maker(self, tokenizer: Tokenizer, data: DataConfig) -> Callable[[list], Row]:
        """The function that makes a row of the pieces chosen for it, which take ``data.row_tokens`` at most."""

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
        """This rank's share of what a network is asked in evaluation, from the first ``evaluation.samples`` samples of
        each source.

        The same at every call, and all ranks' shares together are the same for any number of ranks; what cannot be read
        is left out.

        Args:
            refused: counts what is left out, by its reason; over all ranks each sample once.

        Raises:
            UserError: there is nothing to ask, or the split is missing.
        """

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose keys do not fit these rows, before anything is read.

        Raises:
            UserError: the first thing found, in one line.
        """
        if recipe.data.augmentation is not None and not self.augmented:
            refuse(recipe, "data.augmentation", f"data.rows={self.name} are read as they are; set null")

    def warning(self, data: DataConfig) -> str | None:
        """What a person should know before a run begins to read; None: nothing.

        Raises:
            UserError: what is wrong for certain.
        """
        return None
