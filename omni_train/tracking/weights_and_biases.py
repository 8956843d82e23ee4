"""Logging of a run to Weights & Biases (wandb)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omni_train.data.samples.kinds import medium_kinds
from omni_train.errors import UserError, cannot_write, first_line
from omni_train.evaluation.base import Cell, Exhibit, Medium
from omni_train.recipe.schema import Recipe
from omni_train.tracking.base import Callback


class Wandb(Callback):
    """Callback that logs to a wandb run, which is resumed under the same id when the run is.

    Args:
        recipe: a validated recipe; its ``tracking`` says how.
        directory: directory of the run.

    Raises:
        UserError: wandb refuses the run, or its files cannot be written.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # tables with media, until they are sent
        import wandb

        self._wandb, self._directory = wandb, directory
        identity = directory / "wandb_id"
        try:
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self._run = wandb.init(
                mode=recipe.tracking.mode.value,
                project=recipe.tracking.project,
                entity=recipe.tracking.entity,
                tags=list(recipe.tracking.tags),
                name=recipe.run,
                id=identity.read_text().strip(),
                resume="allow",
                dir=str(directory),
                config=asdict(recipe),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking: wandb refuses: {first_line(error)}; log in, or choose tracking=wandb_offline"
            ) from error
        except OSError as error:
            raise cannot_write(directory, error) from error

    def on_metrics(self, metrics: dict[str, float]) -> None:
        self._run.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def on_exhibits(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """Log a table of the exhibits; their media are kept as files of the run."""
        if not exhibits:
            return
        rows = [exhibit.cells() for exhibit in exhibits]
        table = self._wandb.Table(columns=list(rows[0]), allow_mixed_types=True)
        for row in rows:
            table.add_data(*map(self._shown, row.values()))
        self._run.log({exhibits[0].table: table}, step=step)

    def _shown(self, cell: Cell):
        if not isinstance(cell, Medium):
            return cell
        path = self._directory / cell.name
        if isinstance(cell.content, Path):
            path = cell.content
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cell.content)
        kind = medium_kinds()[cell.kind]
        shows = kind.wandb is not None and (kind.shown is None or path.suffix in kind.shown)
        return getattr(self._wandb, kind.wandb)(str(path)) if shows else None

    def close(self) -> None:
        self._run.finish()
