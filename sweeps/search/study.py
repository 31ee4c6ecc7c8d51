"""Optuna's study of a run: the durable record of every trial, written by the searcher, read by everyone else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from cluster import paths
from sweeps.definition import DistributionSpec, SearchSpec

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAILED",
}


@dataclass(frozen=True)
class TrialRecord:
    """One trial as ``result.json`` tells it. ``eval_loss`` is its best; ``device_seconds`` seconds times devices."""

    trial_id: str
    state: State
    reason: str | None
    message: str | None
    params: dict[str, Any]
    eval_loss: float | None
    steps: int
    trained_tokens: int
    seconds: float
    device_seconds: float
    curve: tuple[tuple[int, float], ...]
    """(shared step, eval loss) of every evaluation."""

    def as_result(self) -> dict[str, Any]:
        """The fields that ``result.json`` keeps."""
        return {name: value for name, value in self.__dict__.items() if name not in {"message", "curve"}}


def trial_id(number: int) -> str:
    """Optuna's trial number as a name for directories and people."""
    return f"t{number:04d}"


def open_study(run_id: str, search: SearchSpec) -> optuna.Study:
    """The run's study, made at the first call; warm-start points are enqueued once, then."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = paths.study_file(run_id)
    is_new = not journal.exists()
    journal.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=run_id,
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="minimize",
        load_if_exists=True,
    )
    study.sampler = make_sampler(search, len(study.trials))
    if is_new:
        for point in search.points_to_evaluate:
            study.enqueue_trial(dict(point))
    return study


def make_sampler(search: SearchSpec, trials_before: int) -> optuna.samplers.BaseSampler:
    """The definition's sampler. A resumed study continues its random sequence rather than repeating it."""
    seed = search.seed + trials_before
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.n_startup_trials, constant_liar=True)


def distribution(spec: DistributionSpec) -> BaseDistribution:
    """Optuna's distribution; whole bounds and step make it an integer one."""
    if spec.choices is not None:
        return CategoricalDistribution(spec.choices)
    low, high = spec.bounds()
    step = 1 if spec.step is None else spec.step
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return IntDistribution(low, high, log=spec.log, step=step)
    return FloatDistribution(low, high, log=spec.log, step=spec.step)


def records(study: optuna.Study) -> list[TrialRecord]:
    """Every trial that was started, in order."""
    return [record(trial) for trial in study.get_trials(deepcopy=False) if trial.state in _STATES]


def record(trial: FrozenTrial) -> TrialRecord:
    facts, curve = trial.user_attrs, sorted(trial.intermediate_values.items())
    return TrialRecord(
        trial_id=trial_id(trial.number),
        state=_STATES[trial.state],
        reason=facts.get("reason"),
        message=facts.get("message"),
        params=dict(trial.params),
        eval_loss=min((loss for _, loss in curve), default=None),
        steps=curve[-1][0] if curve else 0,
        trained_tokens=facts.get("trained_tokens", 0),
        seconds=facts.get("seconds", 0.0),
        device_seconds=facts.get("device_seconds", 0.0),
        curve=tuple(curve),
    )


def best(trials: list[TrialRecord]) -> TrialRecord | None:
    """The completed trial with the lowest eval loss. A pruned one never wins: it was not trained to its end."""
    complete = [trial for trial in trials if trial.state == "COMPLETE" and trial.eval_loss is not None]
    return min(complete, key=lambda trial: (trial.eval_loss, trial.trial_id), default=None)
