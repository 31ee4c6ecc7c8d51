from __future__ import annotations

import random

import pytest

from sweeps import comparison
from trainables.metrics import Answer
from trainables.spec import EvaluationSpec

SPEC = EvaluationSpec(resamples=500)


def answers(flags: list[bool], kind: str = "label") -> list[Answer]:
    """A right answer for every True."""
    return [Answer(f"p{n}", f"{kind} {n % 2}", f"{kind} {n % 2}" if flag else "wrong") for n, flag in enumerate(flags)]


def test_a_gain_is_paired_and_its_interval_holds_it() -> None:
    other = [n % 2 == 0 for n in range(100)]
    winner = [flag or n % 5 == 1 for n, flag in enumerate(other)]
    gain = comparison.gains("classification", answers(winner), answers(other), SPEC)["exact_match"]
    assert gain.gain == pytest.approx(0.1)
    assert 0 < gain.low < gain.gain < gain.high
    # unpaired, the same shares could not tell: the standard error of each is 0.05
    swapped = comparison.gains("classification", answers(other), answers(winner), SPEC)["exact_match"]
    assert (swapped.gain, swapped.low) == (-gain.gain, pytest.approx(-gain.high, abs=0.02))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = random.Random(1), 0
    for _ in range(100):
        winner, other = [rng.random() < 0.7 for _ in range(80)], [rng.random() < 0.5 for _ in range(80)]
        gain = comparison.general_gain(answers(winner), answers(other), SPEC)
        assert gain is not None
        held += gain.low <= 0.2 <= gain.high
    assert 88 <= held <= 99


def test_no_difference_has_an_interval_of_no_width() -> None:
    same = answers([True, False] * 10)
    found = comparison.gains("classification", same, same, SPEC)
    assert (found["accuracy"].gain, found["accuracy"].low, found["accuracy"].high) == (0, 0, 0)
    assert (found["f1"].gain, found["f1"].low, found["f1"].high) == (0, 0, 0)


def test_metrics_of_all_answers_together_have_intervals_too() -> None:
    winner, other = answers([True] * 36 + [False] * 4), answers([True] * 20 + [False] * 20)
    gain = comparison.gains("classification", winner, other, SPEC)["f1"]
    assert 0 < gain.low < gain.gain < gain.high < 1


def test_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="paired"):
        comparison.gains("classification", answers([True]), answers([True, False]), SPEC)
