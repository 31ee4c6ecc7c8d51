"""Which engine a trial goes to. Values in, an order out; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from trainables.spec import TrainingSpec


class Bucket(NamedTuple):
    """What trials that share a pass had better have in common."""

    length: int
    """Power of two of the examples in a pass: a short batch waits for the long ones beside it."""
    rank: int
    """Power of two of r."""


class Occupancy(NamedTuple):
    """One engine: its free slots and the trials in the others, the newest last."""

    free: int
    """Slots; fewer than none where an engine is gone, or starting again."""
    buckets: Mapping[str, Bucket]
    """By trial; of those that are on their way here, too."""
    judged: Set[str] = frozenset()
    """Trials of which a report is being judged: they may be about to end."""
    movable: Set[str] = frozenset()
    """Trials that train here and are not being judged."""

    def told(self, trial_id: str, goes_on: bool) -> Occupancy:
        """After a verdict that may not have come here yet."""
        buckets = {name: bucket for name, bucket in self.buckets.items() if goes_on or name != trial_id}
        return Occupancy(self.free, buckets, self.judged - {trial_id}, self.movable & buckets.keys())


class Move(NamedTuple):
    """A trial, and the places of the engine that it leaves and of the one that it goes to."""

    trial_id: str
    here: int
    there: int


def bucket(training: TrainingSpec) -> Bucket:
    return Bucket(_power(training.per_device_train_batch_size), _power(training.r))


def preferred(own: Bucket, engines: Sequence[Occupancy]) -> list[int]:
    """Places of the engines with a free slot, best first: most free slots, then like lengths, then like ranks."""

    def order(place: int) -> tuple[int, int, int]:
        engine, others = engines[place], engines[place].buckets.values()
        lengths = sum(other.length != own.length for other in others)
        return -engine.free, lengths, sum(other.rank != own.rank for other in others)

    return sorted((place for place, engine in enumerate(engines) if engine.free > 0), key=order)


def evener(engines: Sequence[Occupancy]) -> Move | None:
    """What to move so that engines share what is left of a sweep, once no trial comes to the slots of those that end.

    From the busiest engine to the least busy one that has a slot, where two or more trials lie between them. Trials
    that are being judged may all end, or none: they count where one would come to, and not where one would leave.
    """
    sure = [len(engine.buckets.keys() - engine.judged) for engine in engines]
    most = [len(engine.buckets) for engine in engines]
    sources = [place for place, engine in enumerate(engines) if engine.movable]
    goals = [place for place, engine in enumerate(engines) if engine.free > 0]
    if not sources or not goals:
        return None
    here, there = max(sources, key=sure.__getitem__), min(goals, key=most.__getitem__)
    if sure[here] < most[there] + 2:
        return None
    return Move([trial_id for trial_id in engines[here].buckets if trial_id in engines[here].movable][-1], here, there)


def _power(value: int) -> int:
    """Least power of two that holds ``value``."""
    return 1 << (value - 1).bit_length()
