"""ASHA over reports of engines: what was evaluated together is judged together, in whatever order it is told, and who
came to a rung before others goes no further than with them.
"""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from sweeps.search.ledger import Ledger
from sweeps.search.scheduler import WatchedASHA
from sweeps.search.study import TrialRecord
from trainables.contract import Peer


class Search:
    """A scheduler with rungs at steps 10 and 30, and trials that report what they are told to."""

    def __init__(self, trials: str, reduction_factor: float = 3) -> None:
        self.asha = WatchedASHA(Ledger(), grace_steps=10, max_steps=40, reduction_factor=reduction_factor)
        self.trials: dict[str, Any] = {}
        self.stopped = ""
        self.begin(*trials)

    def stop_trial(self, trial: Any) -> None:
        """Tune's, of one that is not being judged."""
        assert self.asha.ledger.read(trial.trial_id).state == "PRUNED"
        self.asha.on_trial_complete(self, trial, trial.last_result)
        trial.status = "TERMINATED"
        self.stopped += trial.config["trial_id"]

    def begin(self, *trials: str) -> None:
        for name in trials:
            self.trials[name] = SimpleNamespace(trial_id=f"tune-{name}", config={"trial_id": name}, status="RUNNING")
            self.asha.on_trial_add(None, self.trials[name])

    def together(
        self, losses: dict[str, float], step: int = 10, peers: bool = True, told: Any = None, last: str = ""
    ) -> str:
        """Reports out of one pass, judged in the order ``told``; the names of those that go on."""
        passed = ""
        for name in told or losses:
            beside = tuple(Peer(other, step, loss) for other, loss in losses.items() if other != name)
            result = {"step": step, "eval_loss": losses[name], "peers": beside if peers else (), "last": name in last}
            decision = self.asha.on_trial_result(self, self.trials[name], result)
            self.trials[name].last_result = result
            passed += name if decision == "CONTINUE" else ""
        return "".join(sorted(passed))


def falling(trials: str) -> dict[str, float]:
    """The first is the best."""
    return {name: 1.0 + place / 10 for place, name in enumerate(trials)}


def test_the_best_third_of_a_pass_goes_on_whichever_is_told_first() -> None:
    for told in permutations("abcdef"):
        assert Search("abcdef").together(falling("abcdef"), told=told) == "ab"


def test_without_peers_a_report_is_compared_with_earlier_ones_alone() -> None:
    assert Search("abcdef").together(falling("abcdef"), peers=False) == "a"
    assert Search("abcdef").together(falling("abcdef"), peers=False, told="fedcba") == "abcdef"


@pytest.mark.parametrize("told", ["ghijkl", "lkjihg"])
def test_a_later_pass_is_compared_with_all_of_earlier_ones(told: str) -> None:
    search = Search("abcdefghijkl")
    assert search.together(falling("abcdef")) == "ab"
    later = {name: loss + 0.05 for name, loss in falling("ghijkl").items()}
    assert search.together(later, told=told) == "gh", "of a1.0 g1.05 b1.1 h1.15 c1.2 i1.25 ... four of twelve go on"


FIRST, NEXT = falling("abcdef"), {name: loss - 0.15 for name, loss in falling("ghijkl").items()}
"""Reports of two engines: g0.85 h0.95 a1.0 i1.05 b1.1 ..., of which four of twelve go on."""


@pytest.mark.parametrize("told", ["ghijkl", "lkjihg"])
def test_who_passed_before_the_rung_had_filled_is_stopped_after_all(told: str) -> None:
    search = Search("abcdefghijkl")
    assert search.together(FIRST) == "ab"
    assert search.stopped == ""
    assert search.together(NEXT, told=told) == "ghi"
    assert search.stopped == "b"


def test_what_a_trial_has_shown_since_counts_for_more() -> None:
    search = Search("abcdefghijkl")
    assert search.together(FIRST) == "ab"
    assert search.together({"a": 0.5, "b": 0.6}, step=20) == "ab"
    search.together(NEXT)
    assert search.stopped == ""


def test_what_a_trial_has_shown_counts_before_its_own_report_is_judged() -> None:
    search = Search("abcdefghijkl")
    assert search.together(FIRST) == "ab"
    assert search.together({"a": 0.5, "b": 0.6}, step=30, told="a") == "a"
    search.together(NEXT)
    assert search.stopped == ""
    assert search.together({"a": 0.5, "b": 0.6}, step=30, told="b") == ""
    assert set(search.asha._rungs[0][1]) == {"tune-a", "tune-b"}


def test_a_trial_that_has_nothing_left_to_train_is_not_stopped() -> None:
    search = Search("abcdefghijkl")
    assert search.together(FIRST, last="b") == "ab"
    search.together(NEXT)
    assert search.stopped == ""


@pytest.mark.parametrize("status", ["PENDING", "TERMINATED"])
def test_a_trial_that_does_not_run_is_not_stopped(status: str) -> None:
    """It may have lost its process, and come back; then it is what it was."""
    search = Search("abcdefghijkl")
    assert search.together(FIRST) == "ab"
    search.trials["b"].status = status
    search.together(NEXT)
    assert search.stopped == ""


def test_trials_without_an_engine_are_judged_once_as_ray_does() -> None:
    search = Search("abcdefghijkl")
    passed = search.together(FIRST, told="fedcba", peers=False)
    assert passed == "abcdef"
    search.together(NEXT, peers=False)
    assert search.stopped == ""


def test_a_trial_is_judged_once_at_a_rung_and_again_at_the_next() -> None:
    search = Search("abc")
    assert search.together(falling("abc"), step=12) == "a", "a report between two rungs counts for the lower"
    assert search.together({"a": 9.0}, step=20) == "a"
    assert search.together({"a": 9.0}, step=30) == "a", "the first that comes so far"
    assert [len(recorded) for _, recorded in search.asha._rungs] == [1, 3]


def test_a_report_that_comes_again_changes_nothing() -> None:
    """Of a trial that goes on elsewhere, or that answers after its last report."""
    search = Search("abcd", reduction_factor=2)
    assert search.together(falling("abcd")) == "ab"
    before = [dict(recorded) for _, recorded in search.asha._rungs]
    assert search.together({"a": 1.0, "b": 1.1}) == "ab"
    assert [dict(recorded) for _, recorded in search.asha._rungs] == before


def test_a_peer_that_is_never_judged_still_counts() -> None:
    search = Search("abcdef")
    assert search.together(falling("abcdef"), told="ca") == "a", "c is the third of six, though the first that is told"


def test_a_trial_that_is_tried_again_before_its_turn_is_judged_then() -> None:
    search = Search("abcdef")
    assert search.together(falling("abcdef"), told="abcde") == "ab"
    search.begin("f")
    assert search.together(falling("abcdef"), told="f") == ""


def test_a_verdict_holds_though_the_trial_is_tried_again() -> None:
    search = Search("abcdef")
    assert search.together(falling("abcdef")) == "ab"
    assert search.together({"c": 0.1}) == ""


def test_what_a_stopped_trial_learned_meanwhile_stands_on_no_rung() -> None:
    search = Search("abc")
    assert search.together(falling("abc"), step=10) == "a"
    assert search.together(falling("abc"), step=30, told="a") == "a"
    assert search.asha._rungs[0] == (30, {"tune-a": -1.0})


def test_peers_of_different_rungs_are_not_compared() -> None:
    search = Search("ab")
    result = {"step": 10, "eval_loss": 2.0, "peers": (Peer("b", 30, 0.1),), "last": False}
    assert search.asha.on_trial_result(search, search.trials["a"], result) == "CONTINUE"
    low, high = reversed([recorded for _, recorded in search.asha._rungs])
    assert (low, high) == ({"tune-a": -2.0}, {"b": -0.1})


def test_a_resumed_run_judges_by_what_was_judged_before() -> None:
    search = Search("gh")
    search.asha.replay(records(falling("abcdef")))
    assert search.together({"g": 1.05, "h": 1.45}) == "g"


def test_a_trial_that_a_resumed_run_takes_up_is_not_judged_again() -> None:
    search = Search("")
    search.asha.replay(records(falling("abcdef")))
    search.begin("b", "c")
    assert search.together({"b": 9.0, "c": 9.0}, step=20) == "bc"
    assert [len(recorded) for _, recorded in search.asha._rungs] == [0, 6]


def records(losses: dict[str, float]) -> list[TrialRecord]:
    """Of trials that were evaluated once, at the first rung."""
    nothing: dict[str, Any] = dict.fromkeys(TrialRecord.__dataclass_fields__)
    return [TrialRecord(**nothing | {"trial_id": name, "curve": ((10, loss),)}) for name, loss in losses.items()]
