from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from trainables.data import quality
from trainables.data.formats import Example, WrongRow


def asked(*answers: str, prompt: str = "question {}") -> list[Example]:
    """One example an answer, each with a question of its own where the prompt has a place for a number."""
    pairs = [(prompt.format(number), answer) for number, answer in enumerate(answers)]
    return [
        Example([{"role": "user", "content": one}, {"role": "assistant", "content": other}], "x.jsonl", line)
        for line, (one, other) in enumerate(pairs, 1)
    ]


def found(examples: Sequence[Example], check: str) -> quality.Finding | None:
    return next((finding for finding in quality.check(examples) if finding.check == check), None)


def test_contradictions_are_inputs_not_rows_and_case_and_space_are_none() -> None:
    assert found(asked("yes", "Yes ", "YES", prompt="is it?"), "contradiction") is None
    finding = found([*asked("yes", "no", "perhaps", prompt="is it?"), *asked("a", "b")], "contradiction")
    assert finding is not None
    assert finding.count == 1
    assert "'perhaps'" in finding.examples[0]


@pytest.mark.parametrize(
    ("usual", "odd"),
    [
        ("This is a whole sentence.", "This one stops in the"),
        ('{"a": "b"}', '{"a": "b'),
        ("```\nx = 1\n```", "```\nx = "),
    ],
)
def test_an_answer_that_stops_early_where_the_others_do_not(usual: str, odd: str) -> None:
    finding = found(asked(*[usual] * 20, odd), "truncated_answer")
    assert finding is not None
    assert (finding.count, finding.examples[0].split(":")[1]) == (1, "21")


def test_answers_that_never_end_with_a_mark_do_not_stop_early() -> None:
    assert found(asked(*["one word"] * 10, *["A sentence."] * 10), "truncated_answer") is None


@pytest.mark.parametrize("shape", ["{}", '{{"label": "{}"}}'])
def test_labels_are_told_by_their_number_and_their_odd_writings(shape: str) -> None:
    labels = ["billing"] * 30 + ["Billing"] * 2 + ["technical"] * 30 + ["legal"] * 2
    examples = asked(*(shape.format(label) for label in labels))
    casing, balance = found(examples, "label_casing"), found(examples, "class_balance")
    assert casing is not None
    assert casing.count == 2
    assert "'billing'" in casing.message
    assert balance is not None
    assert (balance.count, balance.level) == (3, "warning")
    assert "rare: legal" in balance.message


def test_free_answers_are_no_labels() -> None:
    assert found(asked(*(f"an answer of its own, number {n}" for n in range(50))), "class_balance") is None
    assert found(asked(*(json.dumps({"summary": f"text {n}"}) for n in range(50))), "class_balance") is None


@pytest.mark.parametrize(("count", "told"), [(199, "error"), (200, "warning"), (499, "warning"), (500, None)])
def test_how_many_examples_are_enough(count: int, told: str | None) -> None:
    assert [finding.level for finding in quality.size(count, 200)] == ([told] if told else [])


def test_every_wrong_line_is_named_up_to_a_length_that_can_be_read() -> None:
    rows = [WrongRow("x.jsonl", line, "broken_row", "no JSON") for line in (1, 2, 3, 7, *range(10, 100, 2))]
    (finding,) = quality.wrong_rows(rows, dropped=False)
    assert finding.count == 49
    assert "(x.jsonl 1-3, 7, 10, 12," in finding.message
    assert finding.message.endswith("and 27 more); mend them, or set data.wrong_rows to drop")
    assert len(finding.examples) == 5
