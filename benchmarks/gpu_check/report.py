"""Report of results: checks with a limit, measurements, and what was left out; written as JSON after every entry."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass
class Entry:
    """Line of the table. A check has a limit; a measurement has a unit; what is left out has a reason."""

    part: str
    name: str
    value: float | None = None
    limit: float | None = None  # the value must not be above it
    unit: str = ""
    note: str = ""
    ok: bool = True


@dataclass
class Report:
    """Entries, in the order in which they were found.

    Args:
        path: path of the JSON file, written anew with every entry.
        machine: description of the machine.
    """

    path: Path
    machine: dict
    part: str = ""
    entries: list[Entry] = field(default_factory=list)

    def check(self, name: str, error: float, limit: float, note: str = "") -> None:
        """Add an error that must not be above its limit; one that is not a number fails."""
        self._add(Entry(self.part, name, error, limit, note=note, ok=error <= limit))

    def same(self, name: str, got: Iterable[Tensor], want: Iterable[Tensor], limit: float) -> None:
        """Add a check of tensors that must agree: the largest ‖got − want‖ / ‖want‖ among them."""
        errors = [relative_error(one, other) for one, other in zip(got, want, strict=True)]
        worst = max(range(len(errors)), key=lambda i: float("inf") if errors[i] != errors[i] else errors[i])
        self.check(
            name, errors[worst], limit, f"worst of {len(errors)} tensors: the {worst + 1}." if errors[1:] else ""
        )

    def measure(self, name: str, value: float, unit: str, note: str = "") -> None:
        """Add a measurement, which has no limit."""
        self._add(Entry(self.part, name, value, unit=unit, note=note))

    def left_out(self, name: str, reason: str) -> None:
        """Add a check that this machine cannot make."""
        self._add(Entry(self.part, name, note=f"left out: {reason}"))

    def failed(self, name: str, reason: str) -> None:
        """Add a part that broke."""
        self._add(Entry(self.part, name, note=reason, ok=False))

    @property
    def failures(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.ok]

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.path.write_text(
            json.dumps({"machine": self.machine, "entries": [asdict(e) for e in self.entries]}, indent=1)
        )
        print(line(entry), flush=True)

    def show(self) -> None:
        """Print the whole table, failures last."""
        table = Table("", "part", "what", "value", "limit", "")
        for entry in sorted(self.entries, key=lambda entry: not entry.ok):
            value, limit = formatted(entry.value), formatted(entry.limit)
            table.add_row(mark(entry), entry.part, entry.name, f"{value} {entry.unit}".strip(), limit, entry.note)
        Console(width=180).print(table)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error ‖got − want‖ / ‖want‖ in fp64; the absolute norm where only zeros are wanted."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape:
        return float("nan")
    return float((got - want).norm() / (want.norm() or 1.0))


def formatted(value: float | None) -> str:
    """Value with four significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mark(entry: Entry) -> str:
    """First column of an entry: passed, failed, measured or left out."""
    if not entry.ok:
        return "FAIL"
    return "pass" if entry.limit is not None else "-" if entry.value is None else ""


def line(entry: Entry) -> str:
    """Line of an entry that is printed while the parts run."""
    limit = f" (limit {formatted(entry.limit)})" if entry.limit is not None else ""
    note = f"  [{entry.note}]" if entry.note else ""
    return f"{mark(entry):4} {entry.part}: {entry.name}: {formatted(entry.value)} {entry.unit}{limit}{note}".rstrip()


def outputs_and_gradients(function, inputs: dict[str, Tensor], **fixed) -> list[Tensor]:
    """Outputs of a function and the gradient of each input, all on the CPU.

    Args:
        function: takes the inputs by name; returns a tensor or several.
        inputs: those of floating point are differentiated, with weights on the outputs that are random, and the same on
            every device.
        fixed: arguments without gradients.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()
    }
    outputs = function(**leaves, **fixed)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, differentiated, weights)
    return [tensor.detach().cpu() for tensor in (*outputs, *gradients)]
