"""What becomes of a canary: values in, verdict out."""

from __future__ import annotations

import random

import pytest

from serving.counts import Counts
from serving.judgement import Decision, interval, judge
from serving.spec import CanarySpec

SPEC = CanarySpec(step_s=60, min_requests=50, min_feedback=20)


def counts(requests: int = 200, seconds: float = 0.1, **more: float) -> Counts:
    made = Counts(requests=requests, **more)  # type: ignore[arg-type]
    for _ in range(made.answered):
        made.latency.add(seconds)
    return made


@pytest.mark.parametrize(
    ("production", "canary", "elapsed_s", "decision", "words"),
    [
        (counts(), counts(), 60, Decision.ADVANCE, "200 requests, 0 errors"),
        (counts(), counts(), 59, Decision.HOLD, "a step takes 60 s"),
        (counts(), counts(49), 600, Decision.HOLD, "the canary has answered fewer than 50"),
        (counts(49), counts(), 600, Decision.HOLD, "production has answered fewer than 50"),
        (counts(), counts(errors=20), 1, Decision.ROLL_BACK, "error rate 0.100 (20 of 200)"),
        (counts(errors=20), counts(errors=20), 60, Decision.ADVANCE, "20 errors"),
        (counts(), counts(30, errors=10), 1, Decision.ROLL_BACK, "error rate"),
        (counts(), counts(errors=3), 60, Decision.ADVANCE, "3 errors"),
        (counts(rejected=90), counts(rejected=100), 60, Decision.ADVANCE, "0 errors"),
        (counts(), counts(rejected=100), 60, Decision.HOLD, "it refuses 100 of 200 requests"),
        (counts(), counts(cut=40), 60, Decision.HOLD, "it does not come to the end of 40 of 200 answers"),
        (counts(cut=40), counts(cut=40), 60, Decision.ADVANCE, ""),
        (counts(), counts(60, rejected=60), 600, Decision.HOLD, "it refuses 60 of 60 requests"),
        (counts(rejected=150), counts(rejected=160), 60, Decision.HOLD, "the canary has answered fewer than 50"),
        (counts(), counts(120, rejected=100, errors=10), 1, Decision.ROLL_BACK, "error rate 0.500 (10 of 20)"),
        (counts(), counts(invalid=30), 60, Decision.ROLL_BACK, "share of invalid answers 0.150"),
        (counts(), counts(seconds=0.2), 60, Decision.ROLL_BACK, "95 % latency"),
        (counts(), counts(seconds=0.12), 60, Decision.ADVANCE, ""),
        (counts(), counts(20, seconds=9), 60, Decision.HOLD, "fewer than 50"),
        (
            counts(feedback=40, feedback_sum=36),
            counts(feedback=20, feedback_sum=10),
            60,
            Decision.ROLL_BACK,
            "mean feedback 0.500",
        ),
        (counts(feedback=40, feedback_sum=36), counts(feedback=19, feedback_sum=0), 60, Decision.ADVANCE, ""),
        (counts(feedback=200, feedback_sum=180), counts(feedback=20, feedback_sum=16), 60, Decision.ADVANCE, ""),
    ],
)
def test_a_canary_is_judged(production, canary, elapsed_s: float, decision: Decision, words: str) -> None:
    found = judge(SPEC, production, canary, elapsed_s)
    assert found.decision == decision, found
    assert words in found.reason


def test_one_failure_among_few_rolls_nothing_back() -> None:
    assert judge(SPEC, counts(), counts(4, errors=1), 1).decision is Decision.HOLD
    assert judge(SPEC, counts(), counts(50, errors=1), 1).decision is Decision.HOLD
    assert judge(SPEC, counts(), counts(5, errors=5), 1).decision is Decision.ROLL_BACK


def test_an_interval_is_the_score_intervals() -> None:
    """Against the roots of its own definition: (p - share)^2 = z^2 p (1 - p) / n."""
    for bad, total in ((1, 10), (5, 50), (30, 200)):
        share = bad / total
        low, high = interval(share, total)
        assert low < share < high
        for end in (low, high):
            assert (share - end) ** 2 == pytest.approx(1.645**2 * end * (1 - end) / total)
    assert interval(0, 10)[0] == 0
    assert interval(1, 10)[1] == 1


def test_an_equal_canary_is_seldom_rolled_back_though_it_is_looked_at_again_and_again() -> None:
    """By scores of thumbs up and down, and by latencies with a long tail, from 50 requests on to 500."""
    chance = random.Random(1)
    gone = 0
    for _ in range(200):
        production, canary = Counts(), Counts()
        for number in range(500):
            for variant in (production, canary):
                variant.merge(Counts(requests=1, feedback=1, feedback_sum=float(chance.random() < 0.8)))
                variant.latency.add(chance.lognormvariate(0, 0.8))
            if number % 10 == 0 and judge(SPEC, production, canary, 60).decision is Decision.ROLL_BACK:
                gone += 1
                break
    assert gone <= 14, "about one in twenty for each kind, over all looks"
