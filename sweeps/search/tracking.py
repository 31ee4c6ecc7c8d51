"""W&B: one run a trial, grouped by sweep, and a summary run with the comparison table.

Without a key everything is written offline under the run's directory, for a later ``wandb sync``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import paths
from sweeps.definition import TrackingSpec
from sweeps.search.ledger import Ledger
from sweeps.search.study import TrialRecord
from trainables.contract import REPORTED

_COLUMNS = ("trial_id", "state", "reason", "eval_loss", "steps", "trained_tokens", "seconds")
_OF_ONE_RUN = {"WANDB_RUN_ID", "WANDB_SERVICE"}
"""Of W&B's environment: one run's id, and the process that writes the driver's own."""


class _Runs:
    """The W&B runs of a sweep's trials, written by one process of their own, which uploads that hang are ended with.

    Ray's callback starts two processes a trial, 5 s of a core, where a run more in a process costs 0.2 s. Each run has
    a thread, since beginning and finishing one waits for the server.

    Args:
        environment: the driver's W&B settings, which a process on a cluster does not inherit. They come as an argument,
            since a runtime environment is shown by Ray's dashboard, and the key is one of them.
        common: of every run, as ``wandb.init`` takes it.
        timeout_s: how long a run may take to begin.
    """

    def __init__(self, environment: dict[str, str], common: dict[str, Any], timeout_s: int) -> None:
        os.environ.update(environment)
        import wandb

        wandb.setup()  # reads the environment; threads that do it first at once may find half of it
        settings = {"silent": True, "console": "off", "init_timeout": timeout_s}  # no Settings: init writes into one
        self._begin = wandb.init
        self._common = common | {"settings": settings, "reinit": "create_new"}
        self._runs: dict[str, tuple[ThreadPoolExecutor, Future[Any]]] = {}
        self._told: list[Future[None]] = []

    def begin(self, name: str, config: dict[str, Any], run_id: str) -> None:
        """A run for a trial that starts; one that starts again has it already."""
        if name not in self._runs:
            thread = ThreadPoolExecutor(1)
            begun = thread.submit(self._begin, id=run_id, name=name, config=config, **self._common)
            self._runs[name] = thread, begun

    def log(self, name: str, values: dict[str, Any], step: int) -> None:
        self._tell(name, lambda run: run.log(values, step=step))

    def end(self, name: str, state: str, reason: str) -> None:
        def last(run: Any) -> None:
            try:
                run.config.update({"state": state, "reason": reason}, allow_val_change=True)
            finally:
                run.finish()

        self._tell(name, last)
        self._runs[name][0].shutdown(wait=False)

    def _tell(self, name: str, what: Callable[[Any], None]) -> None:
        """In the order of the calls: a run has one thread."""
        thread, run = self._runs[name]
        self._told.append(thread.submit(lambda: what(run.result())))

    def finish(self) -> str | None:
        """Waits until all that was told is written; what failed first, if anything did."""
        failures = [str(failure).strip() or repr(failure) for told in self._told if (failure := told.exception())]
        return failures[0].splitlines()[0] if failures else None


class TrialTracking(Callback):
    """A W&B run for each trial, with how it ended in its config: ``state`` and ``reason``.

    What W&B does not take is not the sweep's failure: a line at the end says so.
    """

    def __init__(self, spec: TrackingSpec, run_id: str, ledger: Ledger) -> None:
        self.ledger, self.timeout_s, self.live = ledger, spec.upload_timeout_s, set[str]()
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        named = {name for name in os.environ if name.startswith("WANDB_")} - _OF_ONE_RUN
        self.runs: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Runs).remote(
            {name: os.environ[name] for name in named},
            {"project": spec.project, "group": run_id, "dir": str(paths.run_dir(run_id))},
            spec.upload_timeout_s,
        )

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial.config["trial_id"]
        self.live.add(name)
        self.runs.begin.remote(name, trial.config, trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" in result:  # a failure, told as a result, has none
            measured = {f"measured/{name}": value for name, value in result.get("measured", {}).items()}
            values = {name: result[name] for name in REPORTED if name in result} | measured
            self.runs.log.remote(trial.config["trial_id"], values, result["step"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        verdict = self.ledger.read(trial.trial_id)
        self._end(trial.config["trial_id"], verdict.state, verdict.reason or "")

    on_trial_error = on_trial_complete

    def close(self) -> None:
        """End all runs. Trials that have not ended are those of a sweep that was interrupted, or failed."""
        for name in sorted(self.live):
            self._end(name, "RUNNING", "interrupted")
        try:
            failure = ray.get(self.runs.finish.remote(), timeout=self.timeout_s)
        except GetTimeoutError:
            failure = f"uploads were not done {self.timeout_s} s after the last trial (tracking.upload_timeout_s)"
        except RayError as error:
            failure = str(error).strip().splitlines()[-1]
        ray.kill(self.runs)
        if failure:
            print(f"W&B: not all of the trials' runs were written: {failure}", file=sys.stderr, flush=True)

    def _end(self, name: str, state: str, reason: str) -> None:
        if name in self.live:
            self.live.remove(name)
            self.runs.end.remote(name, state, reason)

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def tracked(spec: TrackingSpec, run_id: str, ledger: Ledger) -> Iterator[list[Callback]]:
    """Tune's callbacks for W&B, none where it is off. Whatever ends the block, each run ends with it."""
    if not spec.enabled:
        yield []
        return
    tracking = TrialTracking(spec, run_id, ledger)
    try:
        yield [tracking]
    finally:
        tracking.close()


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
