"""One sweep from definition to registered model. ``run`` reads as the way of the data, once, in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cluster import files, paths, session
from cluster.command import say
from sweeps import loading, results
from sweeps.definition import SweepDefinition
from sweeps.results import Outcome

if TYPE_CHECKING:
    from trainables.data.snapshot import Snapshot

Log = Callable[[str], None]

TRIALS = "sweeps.search.trainable"
"""What every trial's process imports."""


def run(definition: SweepDefinition, run_id: str | None = None, log: Log = say) -> dict[str, Any]:
    """Search, prove, merge and register. Data and cluster are checked before the run exists.

    Args:
        run_id: an earlier run to go on with; every stage picks up what it left. None starts a new one.

    Returns:
        The object of ``result.json``, written there whatever the end; status ``interrupted`` after SIGINT or SIGTERM.

    Raises:
        ValueError: the user's input is wrong; no run was made.
        RuntimeError: Winnow or the cluster failed; the run's status is ``failed``.
    """
    with session.forked(_preload(definition)):
        from sweeps import dataset

        data = dataset.prepared(definition, log)
        _check_evaluation(definition, log)
        if run_id:
            _check_same_data(run_id, data)
        tracking_environment(definition)
        with session.connected():
            _check_cluster(definition)
            run_id = run_id or new_run(definition, data)
            log(f"run: {run_id}")
            outcome = Outcome(run_id, definition.name, definition.base_model.model_dump(mode="json"))
            with _only_driver(run_id), _written(outcome):
                _stages(definition, outcome, data, log)
    return outcome.as_result()


def _preload(definition: SweepDefinition) -> list[str]:
    """What a local cluster's workers find imported: on a CPU all that trains trials, scores and merges.

    With GPUs nothing that has torch in it. A fork could use one if nothing had looked for it before, and some library
    among these may.
    """
    if definition.resources.gpus_per_trial:
        return [TRIALS]
    return [TRIALS, "trainables.engine" if definition.packs else "trainables.solo", "trainables.merge"]


def _check_evaluation(definition: SweepDefinition, log: Log) -> None:
    """What proves the winner is there to be asked: hours later would be late to find out."""
    spec = definition.evaluation
    if spec.harness:
        from trainables import harness

        for name, suite in spec.harness.items():
            harness.check(suite, f"evaluation.suites.{name}")
    if spec.judge:
        from sweeps.judge import verdicts
        from trainables.data import suites

        asked = suites.read(spec, definition.data.task_prefixes)
        prompts = sum(len(suite.conversations) for suite in asked if suite.name in spec.judged_safety)
        verdicts.check(spec.judge, prompts, log)


def _stages(definition: SweepDefinition, outcome: Outcome, data: Snapshot, log: Log) -> None:
    outcome.dataset_hash = data.dataset_hash
    winner = _search(definition, outcome, data, log)
    _prove(definition, outcome, winner, data, log)


def _prove(definition: SweepDefinition, outcome: Outcome, trial: dict[str, Any], data: Snapshot, log: Log) -> None:
    from sweeps import promotion

    promoted = promotion.promote(definition, outcome.run_id, trial, data, log)
    outcome.scores, outcome.gains, outcome.gate = promoted.scores, promoted.gains, promoted.gate
    outcome.judge, outcome.review = promoted.judge, promoted.review
    outcome.status = "accepted" if promoted.version else "rejected"
    if promoted.version:
        found = promoted.version
        outcome.model = {"name": found.model, "version": found.version, "path": str(found.path)}


def _search(definition: SweepDefinition, outcome: Outcome, data: Snapshot, log: Log) -> dict[str, Any]:
    """The winning trial; raises KeyboardInterrupt where trials are left to run."""
    from sweeps.search import runner, study, tracking

    search = definition.search
    log(f"search: {search.num_samples} trials, {_backend(definition)}")
    if not search.by_loss_alone:
        log(
            f"search: by {', '.join(search.objectives)}; no trial is stopped early, "
            "for what stops one is eval loss, and it is not all that is searched for"
        )
    trials = runner.run_search(definition, outcome.run_id, data)
    winner = study.best(trials)
    outcome.trials = [trial.as_result() for trial in trials]
    outcome.best_trial_id = winner.trial_id if winner else None
    if definition.tracking.enabled:
        tracking.log_summary(definition.tracking, outcome.run_id, trials, outcome.best_trial_id)
    if len(trials) < search.num_samples or any(trial.state == "RUNNING" for trial in trials):
        raise KeyboardInterrupt
    if winner is None:
        raise RuntimeError(f"no trial completed: {_reasons(trials)}")
    if saved := runner.savings(outcome.run_id):
        log(saved)
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in winner.objectives.items())
    log(f"winner: {winner.trial_id}, {values}")
    others = [trial.trial_id for trial in study.pareto_front(trials) if trial != winner]
    if others and len(search.objectives) > 1:
        log(f"on the Pareto front too: {', '.join(others)}; register one with: promote {outcome.run_id} --trial ID")
    return winner.as_result()


@contextmanager
def _written(outcome: Outcome) -> Iterator[None]:
    """Writes the outcome and the report whatever happens in the block, with the status that it came to."""
    from sweeps import report

    started, before = time.monotonic(), _wall_before(outcome.run_id)
    try:
        yield
    except KeyboardInterrupt:
        outcome.status = "interrupted"
    except Exception as error:
        outcome.status, outcome.error = "failed", f"{type(error).__name__}: {error}"
        raise RuntimeError(f"run {outcome.run_id} failed: {outcome.error}") from error
    finally:
        outcome.wall_s = before + time.monotonic() - started
        outcome.write()
        if outcome.trials:
            report.write_report(outcome.run_id)


def _check_same_data(run_id: str, data: Snapshot) -> None:
    """A resumed run goes on with the data that it began with, or its trials could not be compared."""
    file = paths.dataset_file(run_id)
    began = files.read_json(file)["dataset_hash"] if file.exists() else data.dataset_hash
    if began != data.dataset_hash:
        raise ValueError(
            f"data: run {run_id!r} began with snapshot {began}, but its sources now give {data.dataset_hash}; "
            "put the files back as they were, or start a new run"
        )


def new_run(definition: SweepDefinition, data: Snapshot) -> str:
    """A fresh run's id and directory, the complete definition in it and which data it is for."""
    run_id = f"{definition.name[:40]}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid() % 10000:04d}"
    files.write_json(paths.dataset_file(run_id), {"dataset_hash": data.dataset_hash})
    files.write_json(paths.sweep_file(run_id), definition.model_dump(mode="json"))
    return run_id


def stored_definition(run_id: str) -> SweepDefinition:
    """The definition that a run really ran.

    Raises:
        ValueError: no such run.
    """
    paths.require_run(run_id)
    file = paths.sweep_file(run_id)
    return loading.parse(files.read_json(file), str(file))


def _check_cluster(definition: SweepDefinition) -> None:
    import ray

    resources, total, mend = definition.resources, ray.cluster_resources(), "ask for less in 'resources'"
    session.check_fits("resources: a trial", resources.as_ray(), total, mend)
    if definition.packs:
        wanted = {name: amount * resources.engines for name, amount in resources.engine_as_ray().items()}
        session.check_fits(f"resources: {resources.engines} engine(s)", wanted, total, mend)


def _backend(definition: SweepDefinition) -> str:
    if definition.packs:
        return f"packed: {definition.resources.engines} engine(s) with up to {definition.slots_per_engine} slots each"
    at_once = definition.search.max_concurrent_trials or "as many as fit"
    reason = "" if definition.training.backend == "solo" else f", because {definition.packing_obstacle}"
    return f"{at_once} at once, each its own process{reason}"


def _reasons(trials: list[Any]) -> str:
    return "; ".join(
        f"{trial.trial_id} {trial.state} {trial.reason or ''} {trial.message or ''}" for trial in trials[:5]
    )


def _wall_before(run_id: str) -> float:
    """Seconds that earlier attempts at this run took."""
    file = paths.result_file(run_id)
    return files.read_json(file)["wall_s"] if file.exists() else 0.0


def _only_driver(run_id: str) -> AbstractContextManager[None]:
    """Two drivers on one run would both start its trials; the second is refused."""
    otherwise = f"run {run_id!r} is being driven by another process; wait for it or stop it"
    return files.held(paths.lock_file(run_id), otherwise)


def tracking_environment(definition: SweepDefinition) -> None:
    """W&B quiet, and offline where there is no key; before the Ray session, whose workers inherit it."""
    if definition.tracking.enabled:
        from sweeps.search import tracking

        tracking.prepare_environment()


def promote_trial(run_id: str, trial_id: str | None, log: Log = say) -> dict[str, Any]:
    """Gate and register one trial of a finished or interrupted run; the run's best where ``trial_id`` is None.

    Raises:
        ValueError: no such run or trial, or the trial left no adapter.
    """
    from sweeps.search import study
    from trainables.data import snapshot

    definition, before = stored_definition(run_id), results.read(run_id)
    trials = {trial.trial_id: trial for trial in study.records(study.open_study(run_id, definition.search))}
    chosen = trial_id or before["best_trial_id"]
    if chosen not in trials or not paths.adapter_dir(run_id, chosen).is_dir():
        able = [name for name in trials if paths.adapter_dir(run_id, name).is_dir()]
        raise ValueError(f"--trial: must be a trial with an adapter: {', '.join(able) or 'none'}; but got {chosen!r}")
    data = snapshot.load(paths.datasets() / before["dataset_hash"])
    _check_evaluation(definition, log)
    outcome = Outcome(run_id, definition.name, before["base_model"], dataset_hash=data.dataset_hash)
    outcome.trials, outcome.best_trial_id = before["trials"], before["best_trial_id"]
    with session.forked(_preload(definition)), session.connected(), _only_driver(run_id), _written(outcome):
        _prove(definition, outcome, trials[chosen].as_result(), data, log)
    return outcome.as_result()
