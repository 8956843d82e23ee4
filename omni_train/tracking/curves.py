"""Curves of a pipeline's losses as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omni_train.data.rows.batch import MODALITIES

WHOLE = "0.2"
"""Colour of a loss that is not divided by modality."""


def draw_losses(stages: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the loss over the steps of each stage, stages side by side: by modality where a stage logs that.

    Args:
        stages: name -> logged steps of each stage, in order.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = max(6, 2.2 * len(stages))
    figure, panels = pyplot.subplots(
        1, len(stages), figsize=(width, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    by_modality = {f"loss_{name}": f"C{index}" for index, name in enumerate(MODALITIES)}
    colors = by_modality | {"loss": WHOLE}
    drawn: set[str] = set()
    for axes, (stage, steps) in zip(panels[0], stages.items(), strict=True):
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        logged = {key for step in steps for key in step}
        for key in [name for name in by_modality if name in logged] or ["loss"]:
            drawn.add(key)
            _plot(axes, steps, key, color=colors[key], linewidth=1)
            _plot(axes, steps, f"eval_{key}", color=colors[key], marker="o", linewidth=0)
    panels[0][0].set(ylabel="loss", ylim=(0, None))
    shown = [
        pyplot.Line2D([], [], color=color, label=key.removeprefix("loss_").replace("_", " "))
        for key, color in colors.items()
        if key in drawn
    ]
    shown.append(pyplot.Line2D([], [], color="0.4", marker="o", linewidth=0, label="held-out"))
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot(axes, steps: Sequence[Mapping[str, float]], key: str, **style) -> None:
    points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
