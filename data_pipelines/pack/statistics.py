"""Statistics of packed samples, hours and tokens by modality and language, as a page with pictures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from omni_train import plugins
from omni_train.data.rows.batch import MODALITIES
from omni_train.data.samples.language import language_of
from omni_train.data.samples.lengths import FRAMES_PER_SECOND
from omni_train.data_pipelines.pack.manifest import Line

FIGURES = ("samples", "tokens", "audio_tokens", "vision_tokens", "audio_seconds", "video_seconds", "speech_seconds")
LENGTHS = [2**power for power in range(4, 21)]  # upper ends of the bins, in tokens
SECONDS = [2.0**power for power in range(-1, 17)]


class Statistics:
    """Sums over samples, which can be added up over shards."""

    def __init__(self) -> None:
        plugins.load()  # which add modalities
        self.groups: dict[str, Counter] = {}  # "modality language" -> figures
        self.lengths = {modality: [0] * (len(LENGTHS) + 1) for modality in MODALITIES}
        self.clip_seconds = [0] * (len(SECONDS) + 1)

    @property
    def samples(self) -> int:
        return sum(group["samples"] for group in self.groups.values())

    @property
    def tokens(self) -> int:
        return sum(group["tokens"] for group in self.groups.values())

    def add(self, line: Line) -> None:
        """Count one sample."""
        modality = MODALITIES[line.sequences[0].modality]
        language = language_of(line.fields.get("meta", {}))
        spoken = language.code if language.understood else "not understood"  # of any length, with anything in it
        group = self.groups.setdefault(f"{modality} {spoken}", Counter())
        tokens = sum(len(sequence) for sequence in line.sequences)
        clips = [len(clip) / FRAMES_PER_SECOND for sequence in line.sequences for clip in sequence.mel]
        group.update(
            samples=1,
            tokens=tokens,
            audio_tokens=sum(len(sequence.audio_slots) for sequence in line.sequences),
            vision_tokens=sum(len(sequence.vision_slots) for sequence in line.sequences),
            audio_seconds=sum(clips),
            video_seconds=line.video_seconds,
            speech_seconds=line.speech_seconds,
        )
        self.lengths[modality][int(np.searchsorted(LENGTHS, tokens))] += 1
        for seconds in clips:
            self.clip_seconds[int(np.searchsorted(SECONDS, seconds))] += 1

    def merge(self, other: dict[str, Any]) -> None:
        """Add what :meth:`as_dict` gave for another shard."""
        for name, figures in other["groups"].items():
            self.groups.setdefault(name, Counter()).update(figures)
        for modality, counts in other["lengths"].items():
            self.lengths[modality] = [a + b for a, b in zip(self.lengths[modality], counts, strict=True)]
        self.clip_seconds = [a + b for a, b in zip(self.clip_seconds, other["clip_seconds"], strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Statistics in plain containers and numbers."""
        return {
            "groups": {name: dict(group) for name, group in sorted(self.groups.items())},
            "lengths": self.lengths,
            "clip_seconds": self.clip_seconds,
        }


def write_page(out: Path, statistics: Statistics, refused: dict[str, int]) -> None:
    """Write ``statistics.json``, ``statistics.md`` and its pictures."""
    (out / "statistics.json").write_text(json.dumps(statistics.as_dict() | {"refused": refused}, indent=1) + "\n")
    lines = [
        f"# {out.name}\n",
        "| modality | language | samples | tokens | audio tokens | vision tokens "
        "| hours of sound | hours of video | hours of speech to learn |",
        "|---|---|" + "---:|" * 7,
    ]
    for name, group in sorted(statistics.groups.items()):
        counts = " | ".join(f"{int(group[figure]):,}" for figure in FIGURES[:4])
        hours = " | ".join(f"{group[figure] / 3600:,.3f}" for figure in FIGURES[4:])
        lines.append(f"| {' | '.join(name.split(' ', 1))} | {counts} | {hours} |")
    lines.append(f"\n{statistics.samples:,} samples, {statistics.tokens:,} tokens.\n")
    if refused:
        lines += ["Refused (each line in refused.jsonl):\n", "| reason | lines |", "|---|---:|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(refused.items(), key=lambda item: -item[1])]
    lines += ["\n![lengths](lengths.png)\n", "![durations](durations.png)"]
    (out / "statistics.md").write_text("\n".join(lines) + "\n")
    _histogram(out / "lengths.png", "tokens of a sample", LENGTHS, statistics.lengths)
    _histogram(out / "durations.png", "seconds of a clip of sound", SECONDS, {"sound": statistics.clip_seconds})


def _histogram(file: Path, title: str, ends: list, counts: dict[str, list[int]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    bottom = np.zeros(len(ends) + 1)
    for name, heights in counts.items():
        if any(heights):
            axes.bar(range(len(heights)), heights, bottom=bottom, label=name)
            bottom += heights
    axes.set_xticks(range(len(ends) + 1), [f"≤{end:g}" for end in ends] + [f">{ends[-1]:g}"], rotation=60)
    axes.set_xlabel(title)
    axes.set_ylabel("number")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
