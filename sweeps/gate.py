"""The gate: scores, gains and limits in, verdict out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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


def judge(spec: GateSpec, scores: Scores, gains: Gains) -> Gate:
    """The winner against the limits and against every other contestant that there is.

    Raises:
        ValueError: the metric is not one that answers of this kind have.
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
    if spec.max_latency_s is not None:
        checks.append(_at_most("latency_s", winner["latency_s"], spec.max_latency_s))
    return Gate(tuple(checks))


def judge_merge(spec: GateSpec, before: Gate, loss_difference: float, agreement: float) -> Gate:
    """``before`` with the checks of the merged model against the adapter."""
    return Gate(
        (
            *before.checks,
            _at_most("merge_loss_difference", loss_difference, spec.max_merge_loss_difference),
            _at_least("merge_agreement", agreement, spec.min_merge_agreement),
        )
    )


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
