"""Whether a canary goes on: a pure function of what it and production did, without a clock of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from serving.counts import Counts
from serving.spec import CanarySpec

_Z = 1.645
"""One-sided 95 %."""
_LATE = 0.95
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

    Whatever is held against production has to be worse by more than is allowed even at the better end of its 95 %
    interval; of fewer than ``min_requests``, only where there are several failures. A canary that refuses requests
    which production takes, or does not come to an end where production does, waits for a person: clients must not be
    able to send it back, nor may it go on like that.

    Args:
        production, canary: what each did since the step began.
        elapsed_s: since then.
    """
    for fault in (_failures, _slowness, _dislike):
        if found := fault(spec, production, canary):
            return Judgement(Decision.ROLL_BACK, found)
    if canary.requests >= spec.min_requests and production.requests:
        for told, some, before in (
            ("refuses {} of {} requests as mistakes", canary.rejected, production.rejected),
            ("does not come to the end of {} of {} answers", canary.cut, production.cut),
        ):
            usual = before / production.requests
            if interval(some / canary.requests, canary.requests)[0] > usual + spec.max_error_increase:
                reason = f"it {told.format(some, canary.requests)}, production's share is {usual:.3f}"
                return Judgement(Decision.HOLD, f"{reason}; look into them, then promote it or roll it back")
    for name, counts in (("the canary", canary), ("production", production)):
        if counts.judged < spec.min_requests:
            return Judgement(Decision.HOLD, f"{name} has answered fewer than {spec.min_requests} requests in this step")
    if elapsed_s < spec.step_s:
        return Judgement(Decision.HOLD, f"a step takes {spec.step_s:g} s")
    return Judgement(Decision.ADVANCE, _summary(production, canary))


def _failures(spec: CanarySpec, production: Counts, canary: Counts) -> str | None:
    shares = {
        "error rate": (canary.errors, canary.judged, production.errors, production.judged, spec.max_error_increase),
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
        if max(bad - _PLAIN, total - spec.min_requests) >= 0 and interval(bad / total, total)[0] > before + allowed:
            return (
                f"{name} {bad / total:.3f} ({bad} of {total}), production's is {before:.3f}, allowed more {allowed:g}"
            )
    return None


def _slowness(spec: CanarySpec, production: Counts, canary: Counts) -> str | None:
    if min(canary.answered, production.answered) < spec.min_requests:
        return None
    surely, _ = interval(_LATE, canary.answered)  # of the answers, so many lie below the true 95 % latency, or more
    now_s, least_s, before_s = (
        counts.latency.quantile(share) for counts, share in ((canary, _LATE), (canary, surely), (production, _LATE))
    )
    assert now_s is not None, "answered requests were timed"
    assert least_s is not None, "answered requests were timed"
    assert before_s is not None, "answered requests were timed"
    if least_s <= before_s * spec.max_latency_ratio:
        return None
    limit = f"at least {least_s / before_s:.2f} of it, limit {spec.max_latency_ratio:g}"
    return f"95 % latency {now_s:.3f} s, production's is {before_s:.3f} s, {limit}"


def _dislike(spec: CanarySpec, production: Counts, canary: Counts) -> str | None:
    if min(canary.feedback, production.feedback) < spec.min_feedback:
        return None
    score, usual = canary.feedback_mean, production.feedback_mean
    assert score is not None, "there was feedback"
    assert usual is not None, "there was feedback"
    best, worst = interval(score, canary.feedback)[1], interval(usual, production.feedback)[0]
    if score - usual + math.hypot(best - score, usual - worst) >= -spec.max_feedback_loss:
        return None
    return f"mean feedback {score:.3f}, production's is {usual:.3f}, allowed less {spec.max_feedback_loss:g}"


def interval(share: float, total: int) -> tuple[float, float]:
    """Of a share of ``total``, each end one-sided 95 % (Wilson 1927, the score interval). Scores from 0 to 1 spread no
    more than shares do, so it holds for their mean; of two, the difference's is Newcombe's (1998, method 10)."""
    centre = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    low, high = ((centre + sign * spread) / (1 + _Z**2 / total) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _summary(production: Counts, canary: Counts) -> str:
    def words(counts: Counts) -> str:
        latency = counts.latency.quantile(0.95)
        return f"{counts.requests} requests, {counts.errors} errors, {counts.invalid} invalid" + (
            f", 95 % in {latency:.3f} s" if latency else ""
        )

    return f"canary: {words(canary)}; production: {words(production)}"
