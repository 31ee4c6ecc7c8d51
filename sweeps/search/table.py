"""The live table of trials on standard error: redrawn in a terminal, a line for each change in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import optuna
from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sweeps.search import study as studies
from sweeps.search.study import TrialRecord


class LiveTable(Callback):
    """State, parameters, loss and best of every trial, and the time left."""

    def __init__(self, study: optuna.Study, num_samples: int) -> None:
        self.study, self.num_samples = study, num_samples
        self.console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160)
        self.live: Live | None = None
        self.started, self.seen = time.monotonic(), dict[str, str]()
        self.ended_before = sum(trial.state != "RUNNING" for trial in studies.records(study))

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, transient=False)
            self.live.start()

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        records = studies.records(self.study)
        if self.live:
            self.live.update(self._table(records))
        else:
            self._print_changes(records)

    def on_experiment_end(self, trials: list, **info: Any) -> None:
        self.on_step_end(0, trials)
        if self.live:
            self.live.stop()

    def _table(self, records: list[TrialRecord]) -> Table:
        return trials_table(records, self.num_samples, self._time_left(records))

    def _time_left(self, records: list[TrialRecord]) -> float | None:
        """Seconds, at the pace so far; None before the first trial has ended."""
        ended = sum(record.state != "RUNNING" for record in records)
        here = ended - self.ended_before
        pace = (time.monotonic() - self.started) / here if here else None
        return pace * (self.num_samples - ended) if pace is not None else None

    def _print_changes(self, records: list[TrialRecord]) -> None:
        best = min((record.eval_loss for record in records if record.eval_loss is not None), default=None)
        left = self._time_left(records)
        for record in records:
            loss = f"eval loss {record.eval_loss:.4f} at step {record.steps}" if record.eval_loss is not None else ""
            loss += "".join(f"  {name} {value:.4g}" for name, value in record.objectives.items() if name != "eval_loss")
            state = f"{record.state}{f' ({record.reason})' if record.reason else ''}"
            if self.seen.get(record.trial_id) == f"{state}{record.steps}":
                continue
            self.seen[record.trial_id] = f"{state}{record.steps}"
            parts = [f"{record.trial_id}  {state:<16}", describe(record.params), loss]
            parts += [f"best {best:.4f}"] if best is not None else []
            parts += [f"{left:.0f} s left"] if left is not None else []
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def trials_table(records: list[TrialRecord], num_samples: int, seconds_left: float | None = None) -> Table:
    """All trials as a table for people, the best completed one marked."""
    winner, counted = studies.best(records), sum(record.state != "RUNNING" for record in records)
    losses = [record.eval_loss for record in records if record.eval_loss is not None]
    others = [name for name in (winner.objectives if winner else {}) if name != "eval_loss"]
    best = f", best eval loss {min(losses):.4f}" if losses else ""
    left = f", about {seconds_left:.0f} s left" if seconds_left is not None else ""
    table = Table(title=f"{counted} of {num_samples} trials ended{best}{left}", title_justify="left")
    for column in ("trial", "state", "params", "step", "eval loss", *others, "seconds"):
        table.add_column(column, justify="left" if column in {"trial", "state", "params"} else "right")
    colors = {"COMPLETE": "green", "PRUNED": "yellow", "FAILED": "red", "RUNNING": "cyan"}
    for record in records:
        state = f"{record.state}{f' ({record.reason})' if record.reason else ''}"
        loss = f"{record.eval_loss:.4f}" if record.eval_loss is not None else "-"
        table.add_row(
            f"{record.trial_id}{' *' if record == winner else ''}",
            f"[{colors[record.state]}]{state}[/]",
            describe(record.params),
            str(record.steps),
            loss,
            *(f"{record.objectives[name]:.4g}" if record.objectives else "-" for name in others),
            f"{record.seconds:.0f}",
        )
    return table


def describe(params: dict[str, Any]) -> str:
    """``learning_rate=0.0012 r=16``: parameters on one line, floats in three digits."""
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )
