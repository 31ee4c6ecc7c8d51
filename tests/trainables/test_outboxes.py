"""Outboxes: reports one at a time, in the order told."""

from __future__ import annotations

import pytest

from trainables.outboxes import END, Message, Outbox, Outboxes


@pytest.fixture
def outboxes() -> Outboxes:
    opened = Outboxes()
    for name in ("a", "b"):
        opened.open(name)
    return opened


def report(loss: float) -> Message:
    return ("report", loss, {})


def of(outboxes: Outboxes, trial_id: str) -> Outbox:
    outbox = outboxes.get(trial_id)
    assert outbox is not None
    return outbox


def seen(outbox: Outbox) -> list[Message]:
    return [outbox.get_nowait() for _ in range(outbox.qsize())]


def test_a_report_waits_until_the_one_before_is_judged(outboxes: Outboxes) -> None:
    outboxes.tell("b", report(0.1))
    outboxes.tell("a", report(0.2))
    assert seen(of(outboxes, "b")) == [report(0.1)]
    assert not seen(of(outboxes, "a"))
    outboxes.decided("a")  # is not its turn
    assert not seen(of(outboxes, "a"))
    outboxes.decided("b")
    assert seen(of(outboxes, "a")) == [report(0.2)]


def test_a_trial_that_is_stopped_makes_way_and_hears_no_more(outboxes: Outboxes) -> None:
    stopped, other = of(outboxes, "b"), of(outboxes, "a")
    outboxes.tell("b", report(0.3))
    outboxes.tell("a", report(0.2))
    outboxes.tell("b", report(0.1))
    outboxes.close("b")
    assert seen(stopped) == [report(0.3), END]
    assert seen(other) == [report(0.2)]
    assert list(outboxes) == ["a"]


def test_whoever_waits_for_a_last_word_that_is_dropped_hears_an_end(outboxes: Outboxes) -> None:
    waiting = of(outboxes, "b")
    outboxes.tell("b", report(0.3))
    outboxes.tell("b", ("moved", 1, {}))  # held until the report is judged, and it is stopped at that
    outboxes.close("b")
    assert seen(waiting) == [report(0.3), END]


def test_an_outbox_that_is_opened_anew_ends_the_one_before(outboxes: Outboxes) -> None:
    before = of(outboxes, "b")
    outboxes.open("b")
    outboxes.tell("b", report(0.1))
    assert seen(before) == [END]
    assert seen(of(outboxes, "b")) == [report(0.1)]


def test_a_trial_is_being_judged_from_its_report_to_the_verdict(outboxes: Outboxes) -> None:
    outboxes.tell("b", report(0.1))
    outboxes.tell("a", report(0.2))
    assert outboxes.judged == {"a", "b"}
    outboxes.decided("b")
    assert outboxes.judged == {"a"}
    outboxes.decided("a")
    assert outboxes.judged == set()


def test_a_last_word_frees_the_place_at_once_but_keeps_its_turn(outboxes: Outboxes) -> None:
    last = of(outboxes, "a")
    outboxes.tell("b", report(0.1))
    outboxes.tell("a", report(0.2))
    outboxes.tell("a", END)
    outboxes.tell("a", report(0.0))  # to nobody
    assert list(outboxes) == ["b"]
    assert not seen(last)
    outboxes.decided("b")
    assert seen(last) == [report(0.2)]
    outboxes.decided("a")
    assert seen(last) == [END]


def test_a_failure_needs_no_judgement(outboxes: Outboxes) -> None:
    failed, other = of(outboxes, "a"), of(outboxes, "b")
    outboxes.tell("a", ("failed", "nan", "loss"))
    outboxes.tell("b", report(0.1))
    assert seen(failed) == [("failed", "nan", "loss")]
    assert seen(other) == [report(0.1)]
