"""Which engine a trial goes to. Values in, an order out; no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainables.spec import TrainingSpec


class Bucket(NamedTuple):
    """What trials that share a pass had better have in common."""

    length: int
    """Power of two of the examples in a pass: a short batch waits for the long ones beside it."""
    rank: int
    """Power of two of r."""


class Occupancy(NamedTuple):
    """One engine: its free slots, and the buckets of the trials in the others."""

    free: int
    buckets: Sequence[Bucket]


def bucket(training: TrainingSpec) -> Bucket:
    return Bucket(_power(training.per_device_train_batch_size), _power(training.r))


def preferred(own: Bucket, engines: Sequence[Occupancy]) -> list[int]:
    """Places of the engines with a free slot, best first: most free slots, then like lengths, then like ranks."""

    def order(place: int) -> tuple[int, int, int]:
        engine = engines[place]
        lengths = sum(other.length != own.length for other in engine.buckets)
        return -engine.free, lengths, sum(other.rank != own.rank for other in engine.buckets)

    return sorted((place for place, engine in enumerate(engines) if engine.free > 0), key=order)


def better(own: Bucket, here: int, engines: Sequence[Occupancy]) -> int | None:
    """Where a trial had better go on: an engine that will still be less busy than its own is now, the best first.

    At the end of a sweep no trial comes to engines whose trials have ended, while others still share theirs.
    """
    busy = len(engines[here].buckets)
    return next((place for place in preferred(own, engines) if len(engines[place].buckets) + 1 < busy), None)


def _power(value: int) -> int:
    """Least power of two that holds ``value``."""
    return 1 << (value - 1).bit_length()
