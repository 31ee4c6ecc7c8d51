"""W&B: one run a trial through Ray's callback, grouped by sweep, and a summary run with the comparison table.

Without a key everything is written offline under the run's directory, for a later ``wandb sync``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor
from ray.air.util.node import _force_on_current_node
from ray.tune.experiment import Trial

from cluster import paths
from sweeps.definition import TrackingSpec
from sweeps.search.ledger import Ledger
from sweeps.search.study import TrialRecord

_COLUMNS = ("trial_id", "state", "reason", "eval_loss", "steps", "trained_tokens", "seconds")


class _LoggingActor(_WandbLoggingActor):
    """Ray's actor with the driver's W&B settings: on a cluster it does not inherit them.

    They come as an argument, since a runtime environment, where Ray puts the key, is shown by Ray's dashboard.
    """

    def __init__(self, *args: Any, environment: dict[str, str], **kwargs: Any) -> None:
        os.environ.update(environment)
        super().__init__(*args, **kwargs)


class TrialTracking(WandbLoggerCallback):
    """Ray's callback, with how each trial ended in its W&B run's config: ``state`` and ``reason``."""

    _logger_actor_cls = _LoggingActor
    AUTO_CONFIG_KEYS = [*WandbLoggerCallback.AUTO_CONFIG_KEYS, "state", "reason"]  # noqa: RUF012  as Ray has it

    def __init__(self, spec: TrackingSpec, run_id: str, ledger: Ledger) -> None:
        super().__init__(
            project=spec.project,
            group=run_id,
            excludes=["time_since_restore", "iterations_since_restore", "timestamp", "time_total_s"],
            upload_timeout=spec.upload_timeout_s,
            dir=str(paths.run_dir(run_id)),
            environment={name: value for name, value in os.environ.items() if name.startswith("WANDB_")},
        )
        self.ledger, self.live = ledger, set[Trial]()

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)
        options: Any = _force_on_current_node()
        self._remote_logger_class = ray.remote(num_cpus=0, **options)(self._logger_actor_cls)  # type: ignore[assignment]

    def log_trial_start(self, trial: Trial) -> None:
        self.live.add(trial)
        super().log_trial_start(trial)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        if trial in self._trial_logging_actors:
            verdict = self.ledger.read(trial.trial_id)
            self._log_ending(trial, verdict.state, verdict.reason or "")
            self.live.discard(trial)
        super().log_trial_end(trial, failed)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Ray waits ``upload_timeout`` for runs of interrupted trials, which nobody told to end; this tells them."""
        for trial in self.live & set(self._trial_logging_actors):
            self._log_ending(trial, "RUNNING", "interrupted")
            self._signal_logging_actor_stop(trial=trial)
        super().on_experiment_end(trials, **info)

    def _log_ending(self, trial: Trial, state: str, reason: str) -> None:
        super().log_trial_result(0, trial, {"state": state, "reason": reason, "config": {}})

    def __getstate__(self) -> dict[str, Any]:
        return {}


def prepare_environment() -> None:
    """Offline where no key is set, and quiet. Before the Ray session, whose workers inherit it."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")
    if not has_key():
        os.environ.setdefault("WANDB_MODE", "offline")


def has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path("~/.netrc").expanduser()
    return netrc.is_file() and "api.wandb" in netrc.read_text(encoding="utf-8", errors="replace")


def log_summary(spec: TrackingSpec, run_id: str, trials: list[TrialRecord], best_trial_id: str | None) -> None:
    """The sweep's own W&B run: a table of all trials, and the winner in its summary. Its failure is not the sweep's."""
    import wandb

    try:
        _log_summary(spec, run_id, trials, best_trial_id)
    except wandb.Error as error:
        print(f"W&B: the summary run was not written: {error}", file=sys.stderr, flush=True)


def _log_summary(spec: TrackingSpec, run_id: str, trials: list[TrialRecord], best_trial_id: str | None) -> None:
    import wandb

    names = sorted({name for trial in trials for name in trial.params})
    objectives = sorted({name for trial in trials for name in trial.objectives} - set(_COLUMNS))
    table = wandb.Table(columns=[*_COLUMNS, *objectives, *names])
    for trial in trials:
        facts = trial.as_result() | trial.objectives
        table.add_data(
            *(facts[column] for column in _COLUMNS),
            *(facts.get(name) for name in objectives),
            *(trial.params.get(name) for name in names),
        )
    run = wandb.init(
        project=spec.project,
        group=run_id,
        name=f"{run_id}-summary",
        job_type="sweep",
        dir=str(paths.run_dir(run_id)),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", init_timeout=spec.upload_timeout_s),
    )
    run.log({"trials": table})
    winner = next((trial for trial in trials if trial.trial_id == best_trial_id), None)
    run.summary["best_trial_id"] = best_trial_id
    run.summary["best_eval_loss"] = winner.eval_loss if winner else None
    for state in ("COMPLETE", "PRUNED", "FAILED"):
        run.summary[state.lower()] = sum(trial.state == state for trial in trials)
    run.finish()
