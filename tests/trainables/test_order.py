from __future__ import annotations

import numpy
import pytest

from trainables.order import epoch_order

LENGTHS = numpy.random.default_rng(7).integers(5, 400, size=1003).tolist()


def padded(order: list[int], batch: int) -> int:
    """Tokens of an epoch with every batch padded to its longest example."""
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return sum(len(examples) * max(LENGTHS[example] for example in examples) for examples in batches)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_every_example_comes_once_an_epoch_in_an_order_of_the_seed_and_epoch(strategy: str) -> None:
    order = epoch_order(LENGTHS, 8, strategy, seed=3, epoch=1)
    assert sorted(order) == list(range(len(LENGTHS)))
    assert order == epoch_order(LENGTHS, 8, strategy, seed=3, epoch=1)
    assert order != epoch_order(LENGTHS, 8, strategy, seed=3, epoch=0)
    assert order != epoch_order(LENGTHS, 8, strategy, seed=4, epoch=1)


def test_grouping_by_length_saves_padding_and_mixes_long_batches_with_short_ones() -> None:
    grouped = epoch_order(LENGTHS, 8, "group_by_length", seed=0, epoch=0)
    assert padded(grouped, 8) < 0.65 * padded(epoch_order(LENGTHS, 8, "random", seed=0, epoch=0), 8)
    longest = [max(LENGTHS[example] for example in grouped[start : start + 8]) for start in range(0, 1000, 8)]
    assert abs(numpy.corrcoef(range(len(longest)), longest)[0, 1]) < 0.3
