"""ASHA on the shared step axis, with a watch on what trials report: one bad trial never takes the sweep down."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from sweeps.search.ledger import Ledger, Verdict
from sweeps.search.study import TrialRecord
from trainables.contract import Peer


class _Pass(NamedTuple):
    """Of a trial beside others of its engine: the rung, and the step at which it came there."""

    trial: Trial
    rung: dict[str, float]
    step: float


class WatchedASHA(AsyncHyperBandScheduler):
    """Ray's ASHA that writes its verdicts to a ledger, compares a report with its peers too, and fails a trial whose
    report cannot be compared.

    Ray's own knows only what was judged before: of trials that come to a rung at once it lets the first pass whatever
    it is, and then any that is better than most before it. It goes on for ever with a NaN loss and raises on a missing
    one.

    Engines come to a rung one shortly after the other, and the first passes its own best. So a trial that passed with
    its engine's others is stopped after all where the next engines' show it to be none of the best, until it has
    something newer to be known by.

    Args:
        grace_steps: first rung, in steps of the shared axis, not always whole; 0 turns early stopping off.
        max_steps: the longest trial, in the same steps.
    """

    def __init__(self, ledger: Ledger, grace_steps: float, max_steps: float, reduction_factor: float) -> None:
        super().__init__(
            time_attr="step",
            metric="eval_loss",
            mode="min",
            grace_period=grace_steps or 1,  # type: ignore[arg-type]
            max_t=max(max_steps, grace_steps, 1),  # type: ignore[arg-type]
            reduction_factor=reduction_factor,
            stop_last_trials=False,
        )
        self.ledger, self.is_on = ledger, grace_steps > 0
        self._tunes = dict[str, str]()  # Tune's name of a trial, by its own
        self._passed = dict[str, _Pass]()  # of trials that nothing newer is known of, by Tune's name

    @property
    def _rungs(self) -> list[tuple[float, dict[str, float]]]:
        """From the highest down, its step and what was reported there, the more the better, by trial."""
        return self._brackets[0]._rungs  # type: ignore[return-value]

    def replay(self, trials: Iterable[TrialRecord]) -> None:
        """Fill the rungs with what was judged before a run was interrupted; Ray keeps no scheduler state."""
        for record in trials:
            for milestone, recorded in self._rungs:
                passed = [loss for step, loss in record.curve if step >= milestone]
                if passed:
                    recorded[record.trial_id] = -passed[0]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        name = trial.config["trial_id"]
        if name in self._tunes:  # tried again
            return
        self._tunes[name] = trial.trial_id
        for _, recorded in self._rungs:
            if name in recorded:  # it goes on in a resumed run: at this rung it was judged
                recorded[trial.trial_id] = recorded.pop(name)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        bad = _unusable(result)
        if bad:
            self.ledger.write(trial.trial_id, bad)
            return TrialScheduler.STOP
        if trial.trial_id in self.ledger.verdicts:  # its process died before Tune had stopped it, and was tried again
            return TrialScheduler.STOP
        if not self.is_on:
            return TrialScheduler.CONTINUE
        self._await(result.get("peers", ()))
        self._turn_of(trial)
        rung = self._rung(result["step"])
        comes = rung is not None and trial.trial_id not in rung
        decision = super().on_trial_result(tune_controller, trial, result)
        self._passed.pop(trial.trial_id, None)
        if decision == TrialScheduler.STOP:
            self.ledger.write(trial.trial_id, Verdict("PRUNED"))
        elif rung is not None and comes and result.get("peers") and not result["last"]:
            self._passed[trial.trial_id] = _Pass(trial, rung, result["step"])
        self._take_back(tune_controller, trial)
        return decision

    def _rung(self, step: float) -> dict[str, float] | None:
        """The highest that a report of this step reaches, as Ray has it."""
        return next((recorded for milestone, recorded in self._rungs if step >= milestone), None)

    def _take_back(self, tune_controller: Any, judged: Trial) -> None:
        """Stop whoever has passed a rung that has filled since, and would not pass it now."""
        for name, (trial, rung, _) in list(self._passed.items()):
            others = {other: value for other, value in rung.items() if other != name}
            cutoff: Any = self._brackets[0].cutoff(others)  # type: ignore[arg-type]
            if trial is judged or trial.status != Trial.RUNNING or cutoff is None or rung[name] >= cutoff:
                continue
            self.ledger.write(name, Verdict("PRUNED"))
            tune_controller.stop_trial(trial)

    def _await(self, peers: Iterable[Peer]) -> None:
        """Put reports on their rungs that may be judged later: under their trials' own names, not yet under Tune's."""
        for peer in peers:
            tunes = self._tunes.get(peer.trial_id, "")
            if tunes in self._passed and peer.step > self._passed[tunes].step:
                del self._passed[tunes]
            if tunes in self.ledger.verdicts:  # an engine trains on while it is judged: that never was on a rung
                continue
            highest = self._rung(peer.step)
            if highest is not None and tunes not in highest:
                highest[peer.trial_id] = -peer.eval_loss

    def _turn_of(self, trial: Trial) -> None:
        """A trial is not compared with itself: what its peers said of it makes room for its own report."""
        for _, recorded in self._rungs:
            recorded.pop(trial.config["trial_id"], None)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._passed.pop(trial.trial_id, None)
        if not _unusable(result):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        if not trial.should_recover():  # Tune calls this before a retry too
            self.ledger.write(trial.trial_id, _failure(trial))
        super().on_trial_error(tune_controller, trial)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its scheduler, but a resumed run replays the study instead."""
        return {}


def _unusable(result: dict[str, Any]) -> Verdict | None:
    """Why a report cannot be compared, or None if it can."""
    if "failure_reason" in result:
        return Verdict("FAILED", result["failure_reason"], result.get("failure_message"))
    loss = result.get("eval_loss")
    if not isinstance(loss, (int, float)) or isinstance(loss, bool):
        return Verdict("FAILED", "error", f"reported no eval_loss, but {loss!r}")
    if not math.isfinite(loss):
        return Verdict("FAILED", "nan", f"eval loss is {loss} at step {result.get('step')}")
    return None


def _failure(trial: Trial) -> Verdict:
    """The contract's reason for a trial whose process raised or died."""
    error = _error(trial)
    if isinstance(error, OutOfMemoryError):
        return Verdict("FAILED", "oom", "the node ran out of memory and Ray ended the trial's process")
    if isinstance(error, RayActorError):
        return Verdict("FAILED", "lost", _last_line(str(error)))
    cause = error.cause if isinstance(error, RayTaskError) else error
    return Verdict("FAILED", "error", _last_line(str(cause)) if cause else "the trial ended without a word")


def _error(trial: Trial) -> Exception | None:
    """What the trial's process raised, from the driver's own copy: the one in storage is written later."""
    file = trial.pickled_error_file
    if file is None or not Path(file).exists():
        return None
    return cloudpickle.loads(Path(file).read_bytes())


def _last_line(text: str) -> str:
    return (text.strip().split("\n") or [""])[-1][:500]
