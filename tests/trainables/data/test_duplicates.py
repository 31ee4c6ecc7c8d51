from __future__ import annotations

import random

from trainables.data.duplicates import find_duplicates, shingles

TICKET = "Hello, my Aurora Router loses the connection every hour. This is urgent. Thanks, Ada. Order {}."


def test_shingles_are_runs_of_five_characters() -> None:
    assert shingles("ab  CD e") == {"ab cd", "b cd ", " cd e"}
    assert shingles("abc") == {"abc"}


def test_exact_and_near_repeats_of_an_earlier_text_are_found() -> None:
    texts = [TICKET.format(1234), "something else entirely", TICKET.format(1234), TICKET.format(1234) + "!"]
    found = {(one.index, one.of): one.similarity for one in find_duplicates(texts, 0.85)}
    assert found[2, 0] == 1.0
    assert 0.85 <= found[3, 0] < 1.0
    assert set(found) == {(2, 0), (3, 0)}


def test_no_twin_is_missed_that_comparing_everything_finds() -> None:
    rng = random.Random(0)
    words = [f"{first}{second}" for first in ("al", "ber", "cor", "dun") for second in ("a", "eth", "in", "os", "um")]
    originals = [rng.choices(words, k=60) for _ in range(100)]
    changed = [[rng.choice(words) if rng.random() < 0.06 else word for word in text] for text in originals]
    texts = [" ".join(text) for text in (*originals, *changed)]
    every = [shingles(text) for text in texts]

    def similarity(one: set[str], other: set[str]) -> float:
        return len(one & other) / len(one | other)

    twins = {later for later, own in enumerate(every) if any(similarity(own, other) >= 0.85 for other in every[:later])}
    assert 50 < len(twins) < 100, "some are just below the threshold"
    assert {one.index for one in find_duplicates(texts, 0.85)} == twins


def test_what_repeats_only_a_text_left_out_is_kept() -> None:
    first = "abcdefghijklmnopqrstuvwxyz"
    second, third = f"{first}01", f"{first}0123"  # 22, 24 and 26 shingles, each the start of the next
    assert [(one.index, one.of) for one in find_duplicates([first, second, third], 0.9)] == [(1, 0)]
    assert [(one.index, one.of) for one in find_duplicates([first, second, third], 0.8)] == [(1, 0), (2, 0)]


def test_the_threshold_is_exact_for_the_pair() -> None:
    first, second = "abcdefghij", "abcdefghijk"  # 6 and 7 shingles, 6 shared: 6/7
    assert len(list(find_duplicates([first, second], 0.85))) == 1
    assert list(find_duplicates([first, second], 0.87)) == []
