"""Which engine a trial goes to."""

from __future__ import annotations

from collections.abc import Set

from trainables.placement import Bucket, Move, Occupancy, bucket, evener, preferred
from trainables.spec import TrainingSpec

OWN = Bucket(length=8, rank=16)
LIKE, LONGER, WIDER = OWN, Bucket(16, 16), Bucket(8, 64)


def test_buckets_are_powers_of_two() -> None:
    assert bucket(TrainingSpec(r=12, per_device_train_batch_size=8)) == Bucket(8, 16)
    assert bucket(TrainingSpec(r=8, per_device_train_batch_size=1)) == Bucket(1, 8)


def holding(free: int, *others: Bucket) -> Occupancy:
    return Occupancy(free, {f"other{number}": other for number, other in enumerate(others)})


def test_a_full_engine_is_not_asked() -> None:
    assert preferred(OWN, [holding(0, LIKE), holding(1, LONGER)]) == [1]
    assert preferred(OWN, [holding(0, LIKE)]) == []


def test_free_slots_come_before_likeness() -> None:
    assert preferred(OWN, [holding(1, LIKE, LIKE), holding(2, LONGER)]) == [1, 0]


def test_like_lengths_come_before_like_ranks() -> None:
    assert preferred(OWN, [holding(1, LONGER), holding(1, WIDER), holding(1, LIKE)]) == [2, 1, 0]


def engine(free: int, *trials: str, judged: Set[str] = frozenset(), coming: Set[str] = frozenset()) -> Occupancy:
    return Occupancy(free, dict.fromkeys(trials, LIKE), judged, set(trials) - judged - coming)


def test_the_newest_trial_goes_from_the_busiest_engine_to_the_least_busy_one() -> None:
    assert evener([engine(3, "a"), engine(0, "b", "c", "d"), engine(4)]) == Move("d", 1, 2)
    assert evener([engine(1, "b", "c", "d"), engine(3, "a")]) == Move("d", 0, 1)


def test_trials_stay_where_no_move_would_gain() -> None:
    assert evener([engine(2, "a", "b"), engine(3, "c")]) is None, "they would only change places"
    assert evener([engine(3, "a"), engine(4)]) is None, "it is alone"
    assert evener([engine(2, "a", "b"), engine(0)]) is None, "that engine is starting again"


def test_trials_that_are_being_judged_may_all_end_or_none() -> None:
    rung = {"worse", "worst"}
    assert evener([engine(0, "worse", "best", "worst", judged=rung), engine(2, "a")]) is None, "the best stays"
    assert evener([engine(0, "best", "good", *rung, judged=rung), engine(4)]) == Move("good", 0, 1)
    assert evener([engine(0, "a", "b"), engine(2, *rung, judged=rung)]) is None, "it would come back at the verdict"


def test_a_verdict_counts_before_it_comes_to_the_engine() -> None:
    full, idle = engine(0, "a", "b", judged={"a"}), engine(2)
    assert evener([full, idle]) is None
    assert evener([full.told("a", goes_on=True), idle]) == Move("b", 0, 1)
    ending = engine(1, "c", judged={"c"})
    assert evener([engine(0, "a", "b"), ending]) is None
    assert evener([engine(0, "a", "b"), ending.told("c", goes_on=False)]) == Move("b", 0, 1)


def test_a_trial_that_is_on_its_way_counts_but_does_not_turn_back() -> None:
    assert evener([engine(3, "a"), engine(1, "b", "c", coming={"c"})]) is None
    assert evener([engine(4), engine(0, "b", "c", "d", coming={"c", "d"})]) == Move("b", 1, 0)
    assert evener([engine(4), engine(2, "b", "c", coming={"b", "c"})]) is None
