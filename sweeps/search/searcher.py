"""Ray Tune's searcher over our Optuna study: asks for parameters, and tells every trial's true end.

Ray's own OptunaSearch tells a stopped trial as COMPLETE and leaves one with a NaN loss RUNNING. This one keeps PRUNED,
FAIL and the intermediate values, and takes unfinished trials of an interrupted run up again.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from sweeps.definition import EVAL_LOSS, SearchSpec
from sweeps.search import study as studies
from sweeps.search.ledger import Ledger

_MEASURED = "measured/"
"""Tune hands a searcher the parts of a report's objects one by one, under such names."""

_TOLD = {"COMPLETE": TrialState.COMPLETE, "PRUNED": TrialState.PRUNED, "FAILED": TrialState.FAIL}


class StudySearcher(Searcher):
    """Suggests from ``study`` until the run has ``search.num_samples`` trials.

    Args:
        devices_per_trial: that a trial holds while its backend counts seconds of one.
    """

    def __init__(self, study: optuna.Study, search: SearchSpec, ledger: Ledger, devices_per_trial: float) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self.study, self.search, self.ledger, self.devices = study, search, ledger, devices_per_trial
        self.space = {name: studies.distribution(spec) for name, spec in sorted(search.space.items())}
        self.unfinished = list(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        self.started = len(studies.records(study)) - len(self.unfinished)
        self.live: dict[str, optuna.Trial] = {}

    @property
    def remaining(self) -> int:
        """Trials that this session still has to run."""
        return self.search.num_samples - self.started

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.unfinished:
            frozen = self.unfinished.pop(0)
            trial = optuna.Trial(self.study, frozen._trial_id)
            params = dict(frozen.params)
        else:
            trial = self.study.ask()
            params = {name: trial._suggest(name, distribution) for name, distribution in self.space.items()}
        self.live[trial_id] = trial
        return {"trial_id": studies.trial_id(trial.number), **params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._note(self.live[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        verdict = self.ledger.read(trial_id)
        if result and "eval_loss" in result and verdict.state != "FAILED":  # Tune skips the report that stopped it
            self._note(trial, result)
        trial.set_user_attr("reason", verdict.reason)
        trial.set_user_attr("message", verdict.message)
        state, values = _TOLD[verdict.state], self._values(studies.frozen(trial))
        if state is TrialState.COMPLETE and None in values:
            missing = [name for name, value in zip(self.search.objectives, values, strict=True) if value is None]
            trial.set_user_attr("reason", "error")
            trial.set_user_attr("message", f"ended without a report of {', '.join(missing)}")
            state = TrialState.FAIL
        told = [value for value in values if value is not None]
        self.study.tell(trial.number, told if state is TrialState.COMPLETE else None, state=state)

    def _values(self, trial: optuna.trial.FrozenTrial) -> list[float | None]:
        """By objective, what the trial came to; None where it was not reported."""
        losses = [loss for _, loss in studies.curve(trial)]
        known = trial.user_attrs | trial.user_attrs.get("measured", {}) | {EVAL_LOSS: min(losses, default=None)}
        return [known.get(name) for name in self.search.objectives]

    def _note(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        studies.note(trial, int(result["step"]), float(result["eval_loss"]))
        measured = {key.removeprefix(_MEASURED): value for key, value in result.items() if key.startswith(_MEASURED)}
        if measured:
            trial.set_user_attr("measured", measured)
        trial.set_user_attr("trained_tokens", int(result["trained_tokens"]))
        trial.set_user_attr("seconds", round(float(result["seconds"]), 3))
        trial.set_user_attr("device_seconds", round(float(result["device_seconds"]) * self.devices, 3))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study on disk is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study on disk is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
