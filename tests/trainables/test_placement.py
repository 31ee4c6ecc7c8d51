"""Which engine a trial goes to."""

from __future__ import annotations

from trainables.placement import Bucket, Occupancy, better, bucket, preferred
from trainables.spec import TrainingSpec

OWN = Bucket(length=8, rank=16)
LIKE, LONGER, WIDER = OWN, Bucket(16, 16), Bucket(8, 64)


def test_buckets_are_powers_of_two() -> None:
    assert bucket(TrainingSpec(r=12, per_device_train_batch_size=8)) == Bucket(8, 16)
    assert bucket(TrainingSpec(r=8, per_device_train_batch_size=1)) == Bucket(1, 8)


def test_a_full_engine_is_not_asked() -> None:
    assert preferred(OWN, [Occupancy(0, [LIKE]), Occupancy(1, [LONGER])]) == [1]
    assert preferred(OWN, [Occupancy(0, [LIKE])]) == []


def test_free_slots_come_before_likeness() -> None:
    assert preferred(OWN, [Occupancy(1, [LIKE, LIKE]), Occupancy(2, [LONGER])]) == [1, 0]


def test_like_lengths_come_before_like_ranks() -> None:
    assert preferred(OWN, [Occupancy(1, [LONGER]), Occupancy(1, [WIDER]), Occupancy(1, [LIKE])]) == [2, 1, 0]


def test_a_trial_moves_to_where_it_shares_with_fewer() -> None:
    three = Occupancy(1, [LIKE, LIKE, LIKE])
    assert better(OWN, 0, [three, Occupancy(3, [LIKE])]) == 1
    assert better(OWN, 0, [three, Occupancy(3, [LIKE]), Occupancy(4, [])]) == 2


def test_a_trial_stays_where_no_move_would_gain() -> None:
    two = Occupancy(2, [LIKE, LIKE])
    assert better(OWN, 0, [two, Occupancy(3, [LIKE])]) is None, "the two would only change places"
    assert better(OWN, 0, [Occupancy(2, [LIKE]), Occupancy(4, [])]) is None, "it is alone"
    assert better(OWN, 0, [two, Occupancy(0, [])]) is None, "that engine is starting again"
