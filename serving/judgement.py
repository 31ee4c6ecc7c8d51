"""Whether a canary goes on: a pure function of what it and production did, without a clock of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from serving.counts import Counts
from serving.spec import CanarySpec

_Z = 1.645
"""One-sided 95 %."""
_PLAIN = 5
"""So many failures are judged before there are as many requests as a judgement takes otherwise."""


class Decision(StrEnum):
    ADVANCE = "advance"
    HOLD = "hold"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class Judgement:
    decision: Decision
    reason: str


def judge(spec: CanarySpec, production: Counts, canary: Counts, elapsed_s: float) -> Judgement:
    """What becomes of a canary in its present step.

    A share (errors, invalid answers) is too high where even the lower bound of its 95 % interval lies above
    production's by more than is allowed; of fewer than ``min_requests``, only where there are several failures.

    Args:
        production, canary: what each did since the step began.
        elapsed_s: since then.
    """
    if fault := _fault(spec, production, canary):
        return Judgement(Decision.ROLL_BACK, fault)
    for name, counts in (("the canary", canary), ("production", production)):
        if counts.requests < spec.min_requests:
            return Judgement(Decision.HOLD, f"{name} has answered fewer than {spec.min_requests} requests in this step")
    if elapsed_s < spec.step_s:
        return Judgement(Decision.HOLD, f"a step takes {spec.step_s:g} s")
    return Judgement(Decision.ADVANCE, _summary(production, canary))


def _fault(spec: CanarySpec, production: Counts, canary: Counts) -> str | None:
    shares = {
        "error rate": (canary.errors, canary.requests, production.errors, production.requests, spec.max_error_increase),
        "share of invalid answers": (
            canary.invalid,
            canary.answered,
            production.invalid,
            production.answered,
            spec.max_invalid_increase,
        ),
    }
    for name, (bad, total, bad_before, total_before, allowed) in shares.items():
        before = bad_before / total_before if total_before else 0.0
        if max(bad - _PLAIN, total - spec.min_requests) >= 0 and lower_bound(bad, total) > before + allowed:
            return (
                f"{name} {bad / total:.3f} ({bad} of {total}), production's is {before:.3f}, allowed more {allowed:g}"
            )
    if min(canary.answered, production.answered) >= spec.min_requests:
        now_s, before_s = canary.latency.quantile(0.95), production.latency.quantile(0.95)
        assert now_s is not None, "answered requests were timed"
        assert before_s is not None, "answered requests were timed"
        if now_s > before_s * spec.max_latency_ratio:
            limit = f"{now_s / before_s:.2f} of it, limit {spec.max_latency_ratio:g}"
            return f"95 % latency {now_s:.3f} s, production's is {before_s:.3f} s, {limit}"
    if min(canary.feedback, production.feedback) >= spec.min_feedback:
        score, usual = canary.feedback_mean, production.feedback_mean
        assert score is not None, "there was feedback"
        assert usual is not None, "there was feedback"
        if score < usual - spec.max_feedback_loss:
            return f"mean feedback {score:.3f}, production's is {usual:.3f}, allowed less {spec.max_feedback_loss:g}"
    return None


def lower_bound(bad: int, total: int) -> float:
    """Of the share behind ``bad`` of ``total``, one-sided 95 % (Wilson 1927, the score interval)."""
    share = bad / total
    centre = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    return max(0.0, (centre - spread) / (1 + _Z**2 / total))


def _summary(production: Counts, canary: Counts) -> str:
    def words(counts: Counts) -> str:
        latency = counts.latency.quantile(0.95)
        return f"{counts.requests} requests, {counts.errors} errors, {counts.invalid} invalid" + (
            f", 95 % in {latency:.3f} s" if latency else ""
        )

    return f"canary: {words(canary)}; production: {words(production)}"
