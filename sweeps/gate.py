"""The gate: scores, gains and limits in, verdict out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sweeps.definition import GateSpec, is_gate_metric

Scores = Mapping[str, Mapping[str, float]]
"""By contestant, by metric."""

Gains = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Of the winner over each other contestant, by metric: ``gain``, and ``low`` and ``high`` of its interval."""


@dataclass(frozen=True)
class Check:
    """One limit, the value held against it, and whether it passed."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Gate:
    """All checks. One that failed rejects."""

    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Literal["ACCEPT", "REJECT"]:
        return "ACCEPT" if all(check.passed for check in self.checks) else "REJECT"

    def as_result(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class Opinions:
    """What was said of the answers beside what was counted. None: nobody was asked."""

    judged: float | None = None
    """Of what the judge was asked, the share that it answered."""
    win_rates: Mapping[str, float] = field(default_factory=dict)
    """Of the winner, by other contestant, as the judge chooses."""
    reviews: int = 0
    """Prompts that people have reviewed."""
    review_score: float = 0.0
    """Their average score of the winner's answers."""


def judge(spec: GateSpec, scores: Scores, gains: Gains, opinions: Opinions = Opinions()) -> Gate:
    """The winner against the limits and against every other contestant that there is.

    Raises:
        ValueError: a metric is not one that the answers have.
    """
    winner = scores["winner"]
    if spec.metric not in winner:
        able = ", ".join(filter(is_gate_metric, winner))
        raise ValueError(f"gate.metric: must be one of {able}, which these answers have, but got {spec.metric!r}")
    checks = [_at_least(spec.metric, winner[spec.metric], spec.min_score)]
    least = {
        "base": spec.min_gain,
        "few_shot": spec.min_gain_over_few_shot,
        "production": spec.min_gain_over_production,
    }
    for other, limit in least.items():
        if other in gains:
            checks += _gain(spec, other, gains[other][spec.metric], limit)
    if "general_exact_match" in winner and "general_exact_match" in scores["base"]:
        lost = scores["base"]["general_exact_match"] - winner["general_exact_match"]
        checks.append(_at_most("general_loss", lost, spec.max_general_loss))
    checks += [*_safety(spec, scores), *_suites(spec, scores), *_opinions(spec, winner, opinions)]
    if spec.max_latency_s is not None:
        checks.append(_at_most("latency_s", winner["latency_s"], spec.max_latency_s))
    return Gate(tuple(checks))


def judge_merge(spec: GateSpec, before: Gate, scores: Scores, loss_difference: float, agreement: float) -> Gate:
    """``before`` with the checks of the merged model against the adapter, and of the suites that it was put through."""
    known = {check.name for check in before.checks}
    missing = [name for name in spec.suites if not _measured(name, scores["winner"])]
    if missing:
        raise ValueError(
            f"gate.suites.{missing[0]}: the run has no scores of this suite; leave the limit out, or sweep with it"
        )
    return Gate(
        (
            *before.checks,
            *(check for check in _suites(spec, scores) if check.name not in known),
            _at_most("merge_loss_difference", loss_difference, spec.max_merge_loss_difference),
            _at_least("merge_agreement", agreement, spec.min_merge_agreement),
        )
    )


def _safety(spec: GateSpec, scores: Scores) -> Iterator[Check]:
    """No safety suite has fewer safe answers than it had, of the base or of what is served now."""
    for metric, value in scores["winner"].items():
        suite, _, name = metric.partition(".")
        if name == "safe" and suite != "field_accuracy":  # which is of a field called safe
            before = max(scores[other].get(metric, 0.0) for other in ("base", "production") if other in scores)
            yield _at_most(f"{metric}_loss", before - value, spec.max_safety_loss)


def _measured(suite: str, metrics: Mapping[str, float]) -> list[str]:
    """The metrics of a suite that there are."""
    return [metric.removeprefix(f"{suite}.") for metric in metrics if metric.startswith(f"{suite}.")]


def _suites(spec: GateSpec, scores: Scores) -> Iterator[Check]:
    """Those that have been scored: some are not before the merge."""
    base, winner = scores["base"], scores["winner"]
    for name, limits in spec.suites.items():
        able, metric = _measured(name, winner), f"{name}.{limits.metric}"
        if able and limits.metric not in able:
            raise ValueError(f"gate.suites.{name}.metric: must be one of {', '.join(able)}, but got {limits.metric!r}")
        if able:
            yield _at_least(metric, winner[metric], limits.min_score)
        if able and limits.max_loss is not None:
            yield _at_most(f"{metric}_loss", base[metric] - winner[metric], limits.max_loss)


def _opinions(spec: GateSpec, winner: Mapping[str, float], opinions: Opinions) -> Iterator[Check]:
    """The judge's, where one was asked, and people's, where the definition asks for them."""
    if opinions.judged is not None:
        yield _at_least("judged", opinions.judged, spec.min_judged)
        yield _at_least("judge_score", winner.get("judge_score", 0.0), spec.min_judge_score)
        if spec.min_win_rate is not None:
            for other, rate in opinions.win_rates.items():
                yield _at_least(f"win_rate_over_{other}", rate, spec.min_win_rate)
    if spec.min_review_score is not None:
        yield _at_least("reviews", opinions.reviews, spec.min_reviews)
        yield _at_least("review_score", opinions.review_score, spec.min_review_score)


def _gain(spec: GateSpec, other: str, gain: Mapping[str, float], limit: float) -> Iterator[Check]:
    """Enough of it, and more than chance could give."""
    name = f"{spec.metric}_gain" if other == "base" else f"{spec.metric}_gain_over_{other}"
    yield _at_least(name, gain["gain"], limit)
    if spec.significant:
        low = round(gain["low"], 6)
        yield Check(f"{name}_low", low, 0.0, low > 0)


def _at_least(name: str, value: float, limit: float) -> Check:
    value = round(value, 6)
    return Check(name, value, limit, value >= limit)


def _at_most(name: str, value: float, limit: float) -> Check:
    value = round(value, 6)
    return Check(name, value, limit, value <= limit)
