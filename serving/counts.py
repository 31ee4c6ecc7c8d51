"""What the variants of a model did, in numbers that add up: across ingress replicas, and over time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_FIRST_S, _GROWTH = 0.001, 1.15
"""Bounds of a histogram's buckets: a millisecond, and each 15 % above the one before."""


@dataclass
class Seconds:
    """A histogram of durations; a quantile of it is at most 15 % too high."""

    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        self.buckets[max(0, math.ceil(math.log(max(seconds, _FIRST_S) / _FIRST_S, _GROWTH)))] += 1

    def quantile(self, share: float) -> float | None:
        """The upper bound of the bucket in which so many of all durations lie; None of nothing."""
        wanted, seen = share * self.buckets.total(), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return _FIRST_S * _GROWTH**bucket
        return None


@dataclass
class Counts:
    """One variant's requests. ``errors`` are the server's: 5xx, time-outs, streams that broke."""

    requests: int = 0
    errors: int = 0
    rejected: int = 0
    """The client's mistakes, as vLLM told them (4xx): they say nothing of the variant."""
    invalid: int = 0
    """Answers that are not what was asked for: empty, or no JSON where JSON was wanted."""
    cut: int = 0
    """Answers that ended where they might not be longer: by the request's own limit, the model's, or ours."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    feedback: int = 0
    feedback_sum: float = 0.0
    first_token: Seconds = field(default_factory=Seconds)
    """To the first byte of a stream."""
    latency: Seconds = field(default_factory=Seconds)

    @property
    def judged(self) -> int:
        """Those that say something of the variant."""
        return self.requests - self.rejected

    @property
    def answered(self) -> int:
        return self.judged - self.errors

    @property
    def feedback_mean(self) -> float | None:
        return self.feedback_sum / self.feedback if self.feedback else None

    def merge(self, other: Counts) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Seconds):
                getattr(self, name).buckets.update(value.buckets)
            else:
                setattr(self, name, getattr(self, name) + value)

    def less(self, earlier: Counts) -> Counts:
        """What came since ``earlier``, when these were fewer."""
        found = Counts()
        for name, value in vars(self).items():
            before = getattr(earlier, name)
            since = Seconds(value.buckets - before.buckets) if isinstance(value, Seconds) else value - before
            setattr(found, name, since)
        return found

    def summary(self) -> dict[str, Any]:
        """For people and programs: quantiles in place of histograms."""
        plain = {name: value for name, value in asdict(self).items() if not isinstance(getattr(self, name), Seconds)}
        del plain["feedback_sum"]
        quantiles = {
            f"{name}_{label}_s": _rounded(getattr(self, name).quantile(share))
            for name in ("first_token", "latency")
            for label, share in (("p50", 0.5), ("p95", 0.95))
        }
        return plain | {"feedback_mean": _rounded(self.feedback_mean)} | quantiles


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
