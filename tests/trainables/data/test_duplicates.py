from __future__ import annotations

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


def test_the_threshold_is_exact_for_the_pair() -> None:
    first, second = "abcdefghij", "abcdefghijk"  # 6 and 7 shingles, 6 shared: 6/7
    assert find_duplicates([first, second], 0.85)
    assert not find_duplicates([first, second], 0.87)
