from __future__ import annotations

from sweeps import pages


def test_differences_are_runs_of_words_that_the_other_text_has_not() -> None:
    left, right = pages.differences("the lamp is broken, sadly", "the lamp was broken")
    assert left == [("the lamp ", True), ("is", False), (" broken", True), (", sadly", False)]
    assert right == [("the lamp ", True), ("was", False), (" broken", True)]
    assert pages.differences("same", "same") == ([("same", True)], [("same", True)])
    assert pages.differences("", "new") == ([], [("new", False)])
