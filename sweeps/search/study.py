"""Optuna's study of a run: the durable record of every trial, written by the searcher, read by everyone else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from cluster import paths
from sweeps.definition import EVAL_LOSS, DistributionSpec, SearchSpec, is_minimised

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAILED",
}


_OBJECTIVES, _CURVE = "objectives", "curve"


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
    objectives: dict[str, float]
    """What the search goes by, in the definition's order; empty until the trial is complete."""

    def as_result(self) -> dict[str, Any]:
        """The fields that ``result.json`` keeps; objectives where eval loss alone is not all there is to know."""
        left_out = {"message", "curve"} | ({"objectives"} if set(self.objectives) <= {EVAL_LOSS} else set())
        return {name: value for name, value in self.__dict__.items() if name not in left_out}


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
        directions=["minimize" if is_minimised(name) else "maximize" for name in search.objectives],
        load_if_exists=True,
    )
    if is_new:
        study.set_user_attr(_OBJECTIVES, list(search.objectives))
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


def objectives(study: optuna.Study) -> list[str]:
    """What the study's values are of, in their order."""
    return study.user_attrs.get(_OBJECTIVES, [EVAL_LOSS])


def note(trial: optuna.Trial, step: int, eval_loss: float) -> None:
    """Write an evaluation down, once. Optuna takes no intermediate values in a search by several objectives."""
    known = curve(frozen(trial))
    if step in dict(known):
        return
    if len(trial.study.directions) == 1:
        trial.report(eval_loss, step)
    else:
        trial.set_user_attr(_CURVE, [*known, (step, eval_loss)])


def curve(trial: FrozenTrial) -> list[tuple[int, float]]:
    """(shared step, eval loss) of every evaluation, in order."""
    noted = trial.intermediate_values.items() or [tuple(point) for point in trial.user_attrs.get(_CURVE, [])]
    return sorted(noted)


def frozen(trial: optuna.Trial) -> FrozenTrial:
    """A running trial as it stands on disk."""
    return trial.study._storage.get_trial(trial._trial_id)


def records(study: optuna.Study) -> list[TrialRecord]:
    """Every trial that was started, in order."""
    names = objectives(study)
    return [record(trial, names) for trial in study.get_trials(deepcopy=False) if trial.state in _STATES]


def record(trial: FrozenTrial, names: Sequence[str]) -> TrialRecord:
    facts, points = trial.user_attrs, curve(trial)
    values = trial.values if trial.state is TrialState.COMPLETE else None
    return TrialRecord(
        trial_id=trial_id(trial.number),
        state=_STATES[trial.state],
        reason=facts.get("reason"),
        message=facts.get("message"),
        params=dict(trial.params),
        eval_loss=min((loss for _, loss in points), default=None),
        steps=points[-1][0] if points else 0,
        trained_tokens=facts.get("trained_tokens", 0),
        seconds=facts.get("seconds", 0.0),
        device_seconds=facts.get("device_seconds", 0.0),
        curve=tuple(points),
        objectives=dict(zip(names, values, strict=True)) if values else {},
    )


def best(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The completed trial that is best by the first objective, among equals by the next.

    A pruned one never wins: it was not trained to its end.
    """
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    return min(complete, key=lambda trial: (*_worth(trial), trial.trial_id), default=None)


def pareto_front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Completed trials than which no other is better by one objective and as good by all."""
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    return [trial for trial in complete if not any(_dominates(other, trial) for other in complete)]


def _dominates(one: TrialRecord, other: TrialRecord) -> bool:
    ours, theirs = _worth(one), _worth(other)
    return ours != theirs and all(left <= right for left, right in zip(ours, theirs, strict=True))


def _worth(trial: TrialRecord) -> tuple[float, ...]:
    """The less the better, by every objective."""
    return tuple(value if is_minimised(name) else -value for name, value in trial.objectives.items())
