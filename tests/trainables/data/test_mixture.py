from __future__ import annotations

import pytest

from trainables.data import mixture
from trainables.data.formats import Example
from trainables.spec import DataSpec, ShareSpec, SourceSpec


def source(**settings) -> SourceSpec:
    return SourceSpec(path="x.jsonl", **settings)


def examples(count: int) -> list[Example]:
    return [Example([], "x.jsonl", line, plain=f"text {line}") for line in range(count)]


@pytest.mark.parametrize(
    ("sources", "available", "taken"),
    [
        ([source(), source()], [100, 10], [100, 10]),
        ([source(max_examples=30), source(max_examples=30)], [100, 10], [30, 10]),
        ([source(weight=9), source(weight=1)], [100, 100], [100, 11]),
        ([source(weight=9), source(weight=1)], [1000, 10], [90, 10]),
        ([source(weight=1), source(weight=1, max_examples=20)], [100, 100], [20, 20]),
        ([source(weight=3), source(weight=1), source()], [30, 50, 7], [30, 10, 7]),
        ([source(weight=1), source(weight=1)], [100, 0], [0, 0]),
    ],
)
def test_caps_come_first_then_weights_and_no_example_is_taken_twice(sources, available, taken) -> None:
    assert mixture.amounts(sources, available) == taken


def test_a_draw_goes_by_the_seed_and_leaves_the_other_sources_as_they_were() -> None:
    capped, whole = source(max_examples=5), source(max_examples=9)
    groups = [examples(50), examples(50)]
    first, second = mixture.mix([capped, whole], groups, seed=1)
    assert [len(first), len(second)] == [5, 9]
    assert [one.line for one in first] == sorted({one.line for one in first})
    assert mixture.mix([capped, whole], groups, seed=1) == [first, second]
    assert mixture.mix([source(max_examples=6), whole], groups, seed=1)[1] == second
    assert mixture.mix([capped, whole], groups, seed=2)[0] != first


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"domain": 65, "general": 5, "synthetic": 30}, []),
        ({"domain": 64, "general": 5, "synthetic": 31}, ["tagged synthetic, 31.0% of 100", "at most 30%"]),
        ({"domain": 96, "general": 4}, ["tagged general, 4.0% of 100", "at least 5%"]),
        ({"domain": 100}, ["tagged general, 0.0% of 100", "at least 5%"]),
    ],
)
def test_shares_are_held_against_their_limits(counts, told) -> None:
    limits = {"general": ShareSpec(min=0.05), "synthetic": ShareSpec(max=0.3)}
    found = list(mixture.check_shares(counts, limits))
    assert bool(found) == bool(told)
    assert all(words in found[0].message for words in told)
    assert all(finding.level == "error" for finding in found)


def test_a_limit_for_a_tag_that_no_source_has() -> None:
    with pytest.raises(ValueError, match=r"shares\.synthetic: must be a tag of a source, one of domain"):
        DataSpec(sources=(source(),), shares={"synthetic": ShareSpec(max=0.3)})
    with pytest.raises(ValueError, match=r"min must be at most max, but got min=0\.5 and max=0\.3"):
        ShareSpec(min=0.5, max=0.3)
