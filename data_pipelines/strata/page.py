"""Page of the scores of a folder of speech: their percentiles, and a histogram of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_TITLES = {
    "unscored": "Samples without scores",
    "unmeasured": "Scores that could not be measured",
    "left_out": "Samples that were left out",
}


def write_page(
    out: Path, samples: int, scores: Mapping[str, list[float]], told: Mapping[str, Mapping[str, int]]
) -> None:
    """Write ``strata.md`` and ``strata.png``.

    Args:
        out: folder to write them to.
        samples: number of samples in the folder.
        scores: name -> score of every sample that has it.
        told: ``unscored``, ``unmeasured`` and ``left_out`` -> counts by reason.
    """
    hours = sum(scores.get("seconds", ())) / 3600
    lines = [
        f"# {out.name}\n",
        f"{samples:,} samples, {hours:,.3f} hours of speech with scores.\n",
        f"| score | samples | mean | {' | '.join(f'{one} %' for one in PERCENTILES)} |",
        "|---|" + "---:|" * (2 + len(PERCENTILES)),
    ]
    for name, values in scores.items():
        figures = [float(np.mean(values)), *np.percentile(values, PERCENTILES)]
        lines.append(f"| {name} | {len(values):,} | {' | '.join(f'{figure:.4g}' for figure in figures)} |")
    for what, counts in told.items():
        if counts:
            lines += [f"\n{_TITLES[what]}:\n", "| reason | number |", "|---|---:|"]
            lines += [f"| {reason} | {count:,} |" for reason, count in sorted(counts.items())]
    if scores:
        lines.append("\n![histograms](strata.png)")
        _histograms(out / "strata.png", scores)
    (out / "strata.md").write_text("\n".join(lines) + "\n")


def _histograms(file: Path, scores: Mapping[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(-(-len(scores) // 3), 3, figsize=(12, 3 * -(-len(scores) // 3)), squeeze=False)
    for axes in grid.flat[len(scores) :]:
        axes.remove()
    for axes, (name, values) in zip(grid.flat, scores.items(), strict=False):
        axes.hist(values, bins=40)
        axes.set_xlabel(name)
        axes.set_ylabel("samples")
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
