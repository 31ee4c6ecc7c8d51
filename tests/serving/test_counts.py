"""Counts that add up, and histograms whose quantiles can be trusted."""

from __future__ import annotations

import random

import pytest

from serving.counts import Counts, Seconds


def test_quantiles_are_at_most_a_bucket_too_high() -> None:
    rng = random.Random(0)
    drawn = sorted(rng.lognormvariate(-2, 1) for _ in range(5000))
    made = Seconds()
    for seconds in drawn:
        made.add(seconds)
    for share in (0.5, 0.95, 0.99):
        true = drawn[int(share * len(drawn)) - 1]
        assert true <= made.quantile(share) <= true * 1.16
    assert Seconds().quantile(0.5) is None


def test_what_replicas_counted_adds_up_and_can_be_taken_apart() -> None:
    one, other = (Counts(requests=n, errors=n, completion_tokens=10 * n, feedback=1, feedback_sum=0.5) for n in (1, 2))
    one.latency.add(0.1)
    other.latency.add(9)
    total = Counts()
    for part in (one, other):
        total.merge(part)
    assert (total.requests, total.errors, total.completion_tokens, total.feedback_mean) == (3, 3, 30, 0.5)
    assert total.less(one) == other
    assert total.summary()["latency_p95_s"] == pytest.approx(9, rel=0.16)
    assert one.requests == 1, "what was merged is as it was"
