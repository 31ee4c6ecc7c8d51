"""The gate: scores and limits in, verdict out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sweeps.definition import GateSpec


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


def judge(spec: GateSpec, base: Mapping[str, float], winner: Mapping[str, float]) -> Gate:
    """The winner's scores against the limits and the base's scores; the general set only where both have it."""
    value = winner[spec.metric]
    checks = [
        _at_least(f"{spec.metric}", value, spec.min_score),
        _at_least(f"{spec.metric}_gain", value - base[spec.metric], spec.min_gain),
    ]
    if "general_exact_match" in base and "general_exact_match" in winner:
        lost = base["general_exact_match"] - winner["general_exact_match"]
        checks.append(_at_most("general_loss", lost, spec.max_general_loss))
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


def _at_least(name: str, value: float, limit: float) -> Check:
    value = round(value, 6)
    return Check(name, value, limit, value >= limit)


def _at_most(name: str, value: float, limit: float) -> Check:
    value = round(value, 6)
    return Check(name, value, limit, value <= limit)
