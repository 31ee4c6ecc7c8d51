from __future__ import annotations

import random

import pytest

from sweeps import comparison
from trainables.metrics import Answer, Answered, Scores
from trainables.spec import EvaluationSpec

SPEC = EvaluationSpec(resamples=500)


def scores(flags: list[bool], name: str = "domain", kind: str = "classification") -> Scores:
    """A right answer for every True."""
    answers = [Answer(f"p{n}", f"label {n % 2}", f"label {n % 2}" if flag else "wrong") for n, flag in enumerate(flags)]
    return Scores({}, {name: Answered(kind, answers)})  # type: ignore[arg-type]


def test_a_gain_is_paired_and_its_interval_holds_it() -> None:
    other = [n % 2 == 0 for n in range(100)]
    winner = [flag or n % 5 == 1 for n, flag in enumerate(other)]
    gain = comparison.gains(scores(winner), scores(other), SPEC)["exact_match"]
    assert gain.gain == pytest.approx(0.1)
    assert 0 < gain.low < gain.gain < gain.high
    # unpaired, the same shares could not tell: the standard error of each is 0.05
    swapped = comparison.gains(scores(other), scores(winner), SPEC)["exact_match"]
    assert (swapped.gain, swapped.low) == (-gain.gain, pytest.approx(-gain.high, abs=0.02))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = random.Random(1), 0
    for _ in range(100):
        winner, other = [rng.random() < 0.7 for _ in range(80)], [rng.random() < 0.5 for _ in range(80)]
        both = (scores(side, "general", "general") for side in (winner, other))
        gain = comparison.gains(*both, SPEC)["general_exact_match"]
        held += gain.low <= 0.2 <= gain.high
    assert 88 <= held <= 99


def test_no_difference_has_an_interval_of_no_width() -> None:
    same = scores([True, False] * 10)
    found = comparison.gains(same, same, SPEC)
    assert (found["accuracy"].gain, found["accuracy"].low, found["accuracy"].high) == (0, 0, 0)
    assert (found["f1"].gain, found["f1"].low, found["f1"].high) == (0, 0, 0)


def test_metrics_of_all_answers_together_have_intervals_too() -> None:
    winner, other = scores([True] * 36 + [False] * 4), scores([True] * 20 + [False] * 20)
    gain = comparison.gains(winner, other, SPEC)["f1"]
    assert 0 < gain.low < gain.gain < gain.high < 1


def test_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="paired"):
        comparison.gains(scores([True]), scores([True, False]), SPEC)


def test_every_set_that_both_have_answered_is_compared_by_its_own_names() -> None:
    sets = {"domain": "classification", "general": "general", "hard": "classification", "safety": "safety"}
    flags = [True, False] * 4
    winner, other = (
        Scores({}, {name: scores(flags, name, kind).sets[name] for name, kind in some.items()})
        for some in (sets, {name: kind for name, kind in sets.items() if name != "safety"})
    )
    found = comparison.gains(winner, other, SPEC)
    assert {"exact_match", "general_exact_match", "hard.exact_match", "hard.f1"} <= set(found)
    assert not any(name.startswith("safety") for name in found), "the other was not asked"


def test_answers_that_the_judge_was_not_asked_about_do_not_count() -> None:
    def judged(*grades: int | None) -> Scores:
        answers = [Answer(f"p{n}", "a", "a", judge_score=grade) for n, grade in enumerate(grades)]
        return Scores({}, {"domain": Answered("generation", answers)})

    gain = comparison.gains(judged(5, 4, None, 3, None), judged(3, 4, None, 1, 5), SPEC)["judge_score"]
    assert gain.gain == pytest.approx((2 + 0 + 2) / 3, abs=1e-6)
