from __future__ import annotations

import math

import pytest

from trainables import metrics
from trainables.answers import kind_of
from trainables.metrics import Answer


def pairs(*both: tuple[str, str]) -> list[Answer]:
    return [Answer("p", expected, answer) for expected, answer in both]


@pytest.mark.parametrize(
    ("expected", "kind"),
    [
        (['{"a": 1}'] * 10, "extraction"),
        (['{"a": 1}'] * 9 + ["no"], "extraction"),
        (["yes", "no"] * 10, "classification"),
        (["Yes", "yes ", "NO", "no"] * 3, "classification"),
        ([f"a sentence of its own, number {n}" for n in range(30)], "generation"),
        (["a label that is longer than any label that anybody would want to use"] * 30, "generation"),
        (["one", "two", "three"], "generation"),
    ],
)
def test_the_kind_of_task_follows_from_the_expected_answers(expected, kind) -> None:
    assert kind_of(expected) == kind


def test_extraction_counts_fields_and_strict_json() -> None:
    wanted = '{"a": "x", "b": "y"}'
    found = metrics.measure(
        "extraction",
        pairs((wanted, wanted), (wanted, '{"b": "y", "a": "z"}'), (wanted, '{"a": "x"'), (wanted, f"{wanted} done")),
        ["a", "b"],
    )
    assert found["exact_match"] == 0.25
    assert found["json_validity"] == 0.5
    assert (found["field_accuracy"], found["field_accuracy.a"], found["field_accuracy.b"]) == (0.375, 0.25, 0.5)
    other = metrics.measure("extraction", pairs((wanted, wanted)), ["a"])
    assert other["json_validity"] == 0.0, "a key too many"


def test_a_field_counts_only_where_it_is_expected() -> None:
    found = metrics.measure("extraction", pairs(('{"a": 1}', '{"a": 1}'), ('{"b": 2}', "{}")))
    assert (found["field_accuracy.a"], found["field_accuracy.b"]) == (1.0, 0.0)


def test_classification_by_hand() -> None:
    found = metrics.measure("classification", pairs(("a", "A "), ("a", "b"), ("b", "b"), ("b", "neither")))
    assert found["accuracy"] == 0.5
    assert found["exact_match"] == 0.25
    assert found["precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["recall"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)


def test_generation_by_hand() -> None:
    found = metrics.measure("generation", pairs(("the cat sat on the mat", "the cat sat on the mat")))
    assert all(found[name] == pytest.approx(1.0) for name in ("exact_match", "rouge1", "rouge2", "rougeL", "bleu"))
    half = metrics.measure("generation", pairs(("a b c d", "a b x y")))
    assert (half["rouge1"], half["rouge2"], half["rougeL"]) == (0.5, pytest.approx(1 / 3, abs=1e-6), 0.5)
    assert half["bleu"] < 0.4


def test_a_metric_over_all_is_the_mean_of_each() -> None:
    answers = pairs(("a b c", "a b"), ("d e f", "d e f"), ("g", "x"))
    each, whole = metrics.each("generation", answers), metrics.measure("generation", answers)
    assert all(math.isclose(values.mean(), whole[name], abs_tol=1e-6) for name, values in each.items())


def test_agreement_is_over_prompts() -> None:
    left, right = ([Answer("p", "", text) for text in texts] for texts in ("abcd", "abcx"))
    assert metrics.agreement(left, right) == 0.75
    assert metrics.measure("generation", []) == {}
