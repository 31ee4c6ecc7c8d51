from __future__ import annotations

import pytest

from sweeps import gate
from sweeps.definition import GateSpec

SPEC = GateSpec(min_score=0.8, min_gain=0.1, max_general_loss=0.05)
BASE = {"exact_match": 0.3, "json_validity": 0.5, "general_exact_match": 0.95}
GOOD = {"exact_match": 0.8, "json_validity": 0.9, "general_exact_match": 0.9}


def test_exactly_on_every_limit_is_accepted() -> None:
    verdict = gate.judge(SPEC, BASE, GOOD)
    assert verdict.verdict == "ACCEPT"
    assert [check.name for check in verdict.checks] == ["exact_match", "exact_match_gain", "general_loss"]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"exact_match": 0.799}, {"exact_match"}),
        ({"general_exact_match": 0.899}, {"general_loss"}),
        ({"exact_match": 0.35}, {"exact_match", "exact_match_gain"}),
    ],
)
def test_one_failed_check_rejects(change: dict, failed: set) -> None:
    verdict = gate.judge(SPEC, BASE, GOOD | change)
    assert verdict.verdict == "REJECT"
    assert {check.name for check in verdict.checks if not check.passed} == failed


def test_without_a_general_set_nothing_is_said_of_it() -> None:
    base, winner = ({k: v for k, v in scores.items() if k != "general_exact_match"} for scores in (BASE, GOOD))
    assert len(gate.judge(SPEC, base, winner).checks) == 2


@pytest.mark.parametrize(("difference", "agreement", "verdict"), [(0.05, 0.95, "ACCEPT"), (0.06, 1, "REJECT"),
                                                                  (0, 0.9, "REJECT")])  # fmt: skip
def test_a_merge_that_answers_otherwise_rejects(difference: float, agreement: float, verdict: str) -> None:
    before = gate.judge(SPEC, BASE, GOOD)
    assert gate.judge_merge(SPEC, before, difference, agreement).verdict == verdict


def test_the_metric_is_the_definitions() -> None:
    spec = GateSpec(metric="json_validity", min_score=0.9, min_gain=0.4)
    assert gate.judge(spec, BASE, GOOD).verdict == "ACCEPT"
