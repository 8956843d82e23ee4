"""Strata: which stratum of ``data.strata`` a sample is in, and whether it is drawn this time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import StratumConfig

QUALITY = "quality"
"""Key of a sample's scores in its ``meta``."""
PASSED_OVER = "passed_over"
"""Reason of a sample that may be drawn in another pass."""


class LeftOut(SampleError):
    """Refusal of a sample that the recipe leaves out on purpose; no fault of the data."""


class Strata:
    """Strata of a recipe, in their order.

    A sample is drawn with the probability of its stratum's weight divided by the largest weight, anew at every reading.
    So samples of two strata occur in proportion to their weights, none twice in one pass over the data, and those of
    the largest weight in every pass.

    Args:
        strata: ``data.strata``, at least one of a weight above 0.
    """

    def __init__(self, strata: Sequence[StratumConfig]) -> None:
        self.strata = [(stratum, _bounds(stratum)) for stratum in strata]
        self.largest = max(stratum.weight for stratum in strata)

    def of(self, meta: Mapping[str, Any]) -> StratumConfig:
        """First stratum that a sample matches.

        Raises SampleError ``unscored`` for a sample without scores that none matches, LeftOut ``no_stratum`` for one
        with scores.
        """
        scores = meta.get(QUALITY)
        known = scores if isinstance(scores, dict) else {}
        for stratum, when in self.strata:
            if all(_within(known.get(score), bounds) for score, bounds in when.items()):
                return stratum
        if not known:
            raise SampleError("unscored")
        raise LeftOut("no_stratum")

    def draw(self, meta: Mapping[str, Any], draw: int) -> str:
        """Name of the stratum that a sample is drawn from.

        Args:
            meta: of the sample.
            draw: random number of this reading, from 0 to below 2^63.

        Raises SampleError as ``of``; LeftOut ``stratum_NAME`` for a stratum of weight 0, ``passed_over`` for a sample
        that is not drawn this time.
        """
        stratum = self.of(meta)
        if not stratum.weight:
            raise LeftOut(_reason_of(stratum))
        if draw >= stratum.weight / self.largest * 2**63:  # an exact comparison: the largest weight always passes
            raise LeftOut(PASSED_OVER)
        return stratum.name


def left_out_reasons(strata: Sequence[StratumConfig]) -> list[str]:
    """Reasons for which strata leave samples out on purpose."""
    never = [_reason_of(stratum) for stratum in strata if not stratum.weight]
    return [*never, "no_stratum", PASSED_OVER] if strata else []


def _reason_of(stratum: StratumConfig) -> str:
    return f"stratum_{stratum.name}"


def _bounds(stratum: StratumConfig) -> dict[str, list[float | None]]:
    return {score: bounds for score, bounds in vars(stratum.when).items() if bounds}


def _within(score: Any, bounds: Sequence[float | None]) -> bool:
    if not isinstance(score, int | float) or isinstance(score, bool):
        return False
    low, high = bounds
    return (low is None or score >= low) and (high is None or score <= high)
