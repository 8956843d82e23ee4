"""The loop: rows, step, log, evaluate, save, until the run's length or a request to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from omni_train import platform, stopping
from omni_train.checkpoint.store import step_of
from omni_train.data.rows.base import Row
from omni_train.data.samples.sample import describe
from omni_train.errors import RunFailed, UserError
from omni_train.evaluation.base import Evaluated, Exhibit
from omni_train.platform.logs import say, warn
from omni_train.platform.signals import alive, stop_agreed
from omni_train.recipe.schema import EngineName, Recipe
from omni_train.tracking.base import Callback
from omni_train.tracking.callbacks import build_callbacks
from omni_train.tracking.metrics_file import MetricsFile
from omni_train.training.engines.base import Engine
from omni_train.training.feed import Feed, prepare
from omni_train.training.schedule import Schedule
from omni_train.training.unlogged import UnloggedStep

SECONDS_BETWEEN_SAVES = 5.0
"""Pause before the last save of a run is tried again, where it failed."""
TRIES_WHEN_STOPPED = 3
"""Tries of the last save, at most, where a signal stops the run: a scheduler does not wait for long."""


def build_engine(recipe: Recipe) -> Engine:
    """The recipe's engine. Process groups must exist."""
    if recipe.engine is EngineName.deepspeed:
        from omni_train.training.engines.zero import ZeroEngine

        return ZeroEngine(recipe)
    from omni_train.training.engines.megatron import MegatronEngine

    return MegatronEngine(recipe)


class Trainer:
    """Training loop of one run of a recipe, on this rank. Process groups must exist.

    Args:
        recipe: a validated recipe.

    Raises:
        UserError: the run's directory, a checkpoint or the data cannot be used.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stepped = False  # whether this start has done a step, which the checkpoint that it resumed from lacks
        self.stopped_by: str | None = None
        self.directory = Path(recipe.runs_dir) / recipe.run
        if recipe.schedule.steps > 0:
            prepare(recipe)
        self._saved = self.directory / ".saved"  # not among the checkpoints, to tell when they are gone
        self.unlogged = UnloggedStep(self.directory)
        self.engine = build_engine(recipe)
        self.schedule = Schedule(recipe.schedule, recipe.optimizer)
        self.store = self.engine.open_store(self.directory / "checkpoints")
        self.store.saved = self._mark_saved
        self.step = 0
        self.progress: dict[str, Any] = {
            "tokens": 0.0,
            "samples": 0,
            "skipped_steps": 0,
            "skipped_samples": {},
            "tokens_by_modality": {},
            "samples_by_stratum": {},
            "left_out_samples": {},
            "nonfinite_in_a_row": 0,
        }
        self.feed: Feed | None = None
        self._held_out: list[Row] | None = None
        self._evaluation: Callable[[], Evaluated] | None = None

        resume_from = self.store.latest()
        if resume_from is not None:
            self.progress |= self.engine.resume(self.store, resume_from)
            self.step = step_of(resume_from)
            say(f"resuming from {resume_from} at step {self.step}")
            self._mark_saved()
            stopping.at_once(f"at step {self.step}, nothing new to save")
        else:
            stopping.at_once("before step 1, nothing to save")
            if self._saved.exists():
                raise UserError(
                    f"{self.store.directory}: has no checkpoint any more, and this run has saved some; restore them "
                    f"(is a disk missing?), or remove {self.directory} to start anew"
                )
            metrics = self.directory / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                warn(f"{self.directory}: has logged steps but no checkpoint; the run starts anew")
            self.engine.initialize(self.store)
        alive()
        if recipe.schedule.steps > 0:
            self.feed = Feed(recipe)
            if resume_from is not None and self.step > 0:
                self.feed.restore(self.store.loader_states(resume_from))

    def fit(self) -> bool:
        """Train to the end of the recipe, or to a signal; the last step is always saved.

        Returns:
            False where a signal asked to stop.
        """
        config, world = self.recipe.schedule, platform.parallel.data_world_size()
        callbacks: list[Callback] = []
        expert_load: MetricsFile | None = None
        if platform.rank() == 0:
            callbacks = build_callbacks(self.recipe, self.directory, self.step)
            expert_load = MetricsFile(self.directory / "expert_load.jsonl", self.step)
        try:
            if self.feed is not None and not self.schedule.done(self.step, self.progress["tokens"]):
                self.feed.start()
            alive()
            torch.distributed.barrier()  # no rank takes a step while another would still end at once
            stopping.finish_first(f"finishing step {self.step + 1} and saving")
            goes_on = self._log_unlogged(callbacks)
            while goes_on and not self.schedule.done(self.step, self.progress["tokens"]):
                alive()
                stopping.finish_first(f"finishing step {self.step + 1} and saving")
                metrics = self._train_step(config.global_batch // world)
                self.stepped = True
                self._log_expert_load(expert_load)
                if not self._evaluate_and_log(metrics, callbacks) or stop_agreed():
                    break
                if config.stop_after and self.step >= config.stop_after:
                    break
                if self.step % self.recipe.checkpoint.save_every == 0:
                    self._save()
                self.store.finish()
            self._save_last()
            if by := stop_agreed():  # also a signal that came while saving
                self.stopped_by = by.name
            return self.stopped_by is None
        finally:
            self.store.abandon()
            if self.feed is not None:
                self.feed.close()
            self.engine.close()
            for open_file in [*callbacks, *([expert_load] if expert_load else [])]:
                open_file.close()

    def ending(self) -> str:
        """Reason for which :meth:`fit` returned, in one line."""
        if self.stopped_by is not None:
            state = f"after step {self.step}, saved" if self.stepped else f"at step {self.step}, nothing new to save"
            return f"stopped by {self.stopped_by} {state}; the same command goes on from here"
        return f"finished: step {self.step} of {self.recipe.schedule.steps}, checkpoints in {self.store.directory}"

    def _evaluate_and_log(self, metrics: dict[str, float], callbacks: list[Callback]) -> bool:
        """Evaluate and log after a step, each where it is due. Collective.

        Returns:
            False where a signal came between: the next start makes up for it before its first step.
        """
        config, evaluation_every = self.recipe.schedule, self.recipe.evaluation.every
        losses_due = bool(config.eval_every) and self.step % config.eval_every == 0
        evaluation_due = bool(evaluation_every) and self.step % evaluation_every == 0
        if losses_due or evaluation_due:
            shown = None
            if not (stopped := stop_agreed()):
                stopping.finish_first(f"leaving the evaluation after step {self.step} for the next start, and saving")
                found = self._held_out_losses() if losses_due else {}
                if evaluation_due:
                    evaluated, shown = self._run_evaluation()
                    found |= evaluated
                stopped = stop_agreed()
                alive()
            if stopped:
                self.unlogged.keep(metrics)
                return False
            metrics |= found
            if shown is not None:
                for callback in callbacks:
                    callback.on_exhibits(self.step, shown)
        last = self.schedule.done(self.step, self.progress["tokens"])  # also of a run shorter than log_every
        if self.step % config.log_every == 0 or losses_due or evaluation_due or last:
            for callback in callbacks:
                callback.on_metrics(metrics)
        return True

    def _log_unlogged(self, callbacks: list[Callback]) -> bool:
        """Make up for the evaluation that a signal cut off before this start. Collective."""
        metrics = self.unlogged.read(self.step)
        if metrics is not None and self.feed is not None:
            say(f"evaluating after step {self.step}, which the signal that stopped this run left no time for")
            if not self._evaluate_and_log(metrics, callbacks):
                return False
        self.unlogged.forget()
        return True

    def _log_expert_load(self, file: MetricsFile | None) -> None:
        """Log the load of every expert, where `tracking.expert_load_every` says so. Collective."""
        every = self.recipe.tracking.expert_load_every
        if not every or self.step % every:
            return
        loads = self.engine.expert_loads()
        if file is not None and loads:
            file.on_metrics({"step": self.step, "load_by_layer": loads})

    def _train_step(self, count: int) -> dict[str, float]:
        start = time.perf_counter()
        assert self.feed is not None
        learning_rate = self.schedule.learning_rate(self.step, self.progress["tokens"])
        rows = self.feed.rows(count)
        result = self.engine.train_step(rows, learning_rate, self.step)
        seconds = time.perf_counter() - start
        self.step += 1
        self.progress["tokens"] += result.tokens
        self.progress["samples"] += result.samples
        if result.skipped:
            self._count_skipped(rows)
        self._guard(result.updated)
        flops = self.engine.flops(rows) * platform.parallel.data_world_size()
        rate = flops / seconds
        metrics = {
            "step": self.step,
            **result.metrics,
            "lr": learning_rate,
            "tokens": self.progress["tokens"],
            **self._fractions("fraction", "tokens_by_modality", result.tokens_by_modality),
            **self._fractions("stratum", "samples_by_stratum", result.strata),
            "tokens_per_second": result.tokens / seconds,
            "data_wait_seconds": self.feed.wait_seconds,
            "step_seconds": seconds,
            "tflops_per_second": rate / 1e12,
            "eta_seconds": seconds * (self.recipe.schedule.steps - self.step),
            "skipped_steps": self.progress["skipped_steps"],
            "skipped_samples": sum(self.progress["skipped_samples"].values()),
        }
        if frames := result.tokens_by_modality.get("speech"):
            metrics["speech_frames_per_second"] = frames / seconds
        for reason, number in result.left_out.items():
            self.progress["left_out_samples"][reason] = self.progress["left_out_samples"].get(reason, 0) + number
            metrics[f"left_out_{reason}"] = self.progress["left_out_samples"][reason]
        peak = platform.peak_flops()
        if peak:
            metrics["mfu"] = rate / (peak * platform.world_size())
        return metrics

    def _fractions(self, metric: str, what: str, counted: Mapping[str, float]) -> dict[str, float]:
        """Each one's fraction of what was counted since the run began; nothing for those of which there was nothing.

        Args:
            metric: metrics are named after it.
            what: name of the counts in ``progress``.
            counted: of this step, by name.
        """
        counts = self.progress[what]
        for name, number in counted.items():
            counts[name] = counts.get(name, 0) + number
        return {f"{metric}_{name}": number / sum(counts.values()) for name, number in counts.items() if number}

    def _count_skipped(self, rows: list[Row]) -> None:
        """Add up the samples that the loaders of all data ranks refused, by reason, and say so. Collective."""
        everywhere = platform.parallel.gather_over_data_ranks([row.skipped for row in rows])
        counts = self.progress["skipped_samples"]
        for skipped in (row for rank in everywhere for row in rank):
            for reason, number in skipped.items():
                counts[reason] = counts.get(reason, 0) + number
        say(f"step {self.step}: samples skipped so far: {describe(counts)}")

    def _guard(self, updated: bool) -> None:
        """Count a step that was skipped for a non-finite loss or gradient.

        Raises:
            UserError: more than `safety.max_nonfinite_steps` of them came in a row.
        """
        if updated:
            self.progress["nonfinite_in_a_row"] = 0
            return
        self.progress["nonfinite_in_a_row"] += 1
        self.progress["skipped_steps"] += 1
        in_a_row, allowed = self.progress["nonfinite_in_a_row"], self.recipe.safety.max_nonfinite_steps
        warn(f"step {self.step}: non-finite loss or gradient; the step is skipped ({in_a_row} in a row)")
        if in_a_row > allowed:
            raise UserError(
                f"step {self.step}: non-finite loss or gradient {in_a_row} times in a row, "
                f"safety.max_nonfinite_steps allows {allowed}; lower optimizer.lr or look at the data"
            )

    def _held_out_losses(self) -> dict[str, float]:
        assert self.feed is not None
        if self._held_out is None:
            self._held_out = self.feed.held_out(self.recipe.schedule.eval_rows)
        alive()
        return {f"eval_{name}": value for name, value in self.engine.evaluate(self._held_out).items()}

    def _run_evaluation(self) -> tuple[dict[str, float], Sequence[Exhibit]]:
        """Metrics and exhibits of the network's evaluation on held-out data. Collective."""
        assert self.feed is not None
        if self._evaluation is None:
            self._evaluation = self.engine.evaluation(*self.feed.questions())
        evaluated = self._evaluation()
        metrics = evaluated.metrics
        if self.recipe.evaluation.swap_media and not stop_agreed():
            for name, swapped in (("own", False), ("swapped", True)):
                losses = self.engine.evaluate(self.feed.answers(swapped))
                alive()
                metrics |= {f"eval_{name}_media_{key}": value for key, value in losses.items() if key != "loss"}
        return metrics, evaluated.exhibits

    def _save_last(self) -> None:
        """Save the last step, again and again until it is written.

        Raises:
            RunFailed: it failed `checkpoint.max_failures` times, or fewer where a signal stops the run.
        """
        self.store.failures = 0
        while True:
            self._save()
            self.store.close()
            if self.store.last == self.step:
                return
            if self.store.failures >= TRIES_WHEN_STOPPED and (stopped := stop_agreed()):
                raise RunFailed(
                    f"stopped by {stopped.name}; step {self.step} could not be saved, and the same command goes on "
                    "from the last that was"
                )
            time.sleep(SECONDS_BETWEEN_SAVES)

    def _mark_saved(self) -> None:
        """Leave a file in the run's directory that says that the run has a checkpoint."""
        if platform.rank() == 0:
            with contextlib.suppress(OSError):  # a full disk: the next save tries again
                self._saved.touch()

    def _save(self) -> None:
        alive()
        stopping.finish_first(f"finishing the checkpoint of step {self.step}")
        state = self.feed.state() if self.feed else None
        self.engine.save(self.store, self.step, self.progress, state)
        alive()
