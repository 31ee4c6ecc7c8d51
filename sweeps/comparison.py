"""How much better the winner is, and how sure that is: paired differences with bootstrap intervals. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from trainables import metrics
from trainables.metrics import Answer, Answered, Scores
from trainables.spec import EvaluationSpec


@dataclass(frozen=True)
class Gain:
    """The winner's value less another contestant's, and the interval that holds it with the definition's confidence."""

    gain: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def gains(winner: Scores, other: Scores, spec: EvaluationSpec) -> dict[str, Gain]:
    """By metric, as ``metrics.named`` calls it, on every set of prompts that both have answered.

    The prompts are drawn again ``spec.resamples`` times, with replacement, and both contestants scored on what was
    drawn (the paired percentile bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    return {
        metrics.named(name, metric): gain
        for name in winner.sets
        if name in other.sets
        for metric, gain in _of_set(winner.sets[name], other.sets[name], spec).items()
    }


def _of_set(winner: Answered, other: Answered, spec: EvaluationSpec) -> dict[str, Gain]:
    kind, ours, theirs = winner.kind, winner.answers, other.answers
    assert [one.prompt for one in ours] == [one.prompt for one in theirs], "paired"
    values, others = (metrics.each(kind, answers, spec.json_fields) for answers in (ours, theirs))
    return {name: of_means(values[name] - others[name], spec) for name in values if name in others} | {
        name: _of_all(name, ours, theirs, spec) for name in metrics.joint(kind)
    }


def of_means(differences: np.ndarray, spec: EvaluationSpec) -> Gain:
    """The mean of what was found prompt by prompt, [prompts], NaN where nothing was, and its interval."""
    known = differences[~np.isnan(differences)]
    if known.size < 2 or np.ptp(known) == 0:  # nothing that could be drawn otherwise
        value = float(np.mean(known)) if known.size else 0.0
        return Gain(*[round(value, 6)] * 3)
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=spec.resamples,
        batch=100,
        confidence_level=spec.confidence,
        method="percentile",
        rng=np.random.default_rng(spec.seed),
    )
    low, high = found.confidence_interval
    return Gain(round(float(np.mean(known)), 6), round(float(low), 6), round(float(high), 6))


def _of_all(metric: str, winner: Sequence[Answer], other: Sequence[Answer], spec: EvaluationSpec) -> Gain:
    """Of a metric that only all answers together have: both sides measured again on every draw."""

    def difference(drawn: np.ndarray) -> float:
        ours, theirs = ([side[index] for index in drawn] for side in (winner, other))
        return metrics.together(metric, ours) - metrics.together(metric, theirs)

    random = np.random.default_rng(spec.seed)
    draws = [difference(random.integers(len(winner), size=len(winner))) for _ in range(_JOINT_RESAMPLES)]
    tail = (1 - spec.confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Gain(*(round(float(value), 6) for value in (difference(np.arange(len(winner))), low, high)))


_JOINT_RESAMPLES = 200
"""Each takes milliseconds, not microseconds."""
