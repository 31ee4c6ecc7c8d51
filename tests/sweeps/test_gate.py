from __future__ import annotations

import pytest

from sweeps import gate
from sweeps.definition import GateSpec

SPEC = GateSpec(min_score=0.8, min_gain=0.1, max_general_loss=0.05)
SCORES = {
    "base": {"exact_match": 0.3, "json_validity": 0.5, "general_exact_match": 0.95},
    "few_shot": {"exact_match": 0.6, "json_validity": 0.8},
    "production": {"exact_match": 0.79, "json_validity": 0.9, "general_exact_match": 0.9},
    "winner": {"exact_match": 0.8, "json_validity": 0.95, "general_exact_match": 0.9, "latency_s": 0.2},
}


def gains(margin: float = 0.005, **scores: dict) -> dict:
    """Of the winner over the others, with intervals of ``margin`` to each side."""
    known = SCORES | scores
    return {
        other: {
            metric: {"gain": known["winner"][metric] - value, "low": known["winner"][metric] - value - margin,
                     "high": known["winner"][metric] - value + margin}
            for metric, value in known[other].items()
        }
        for other in known if other != "winner"
    }  # fmt: skip


def failed(verdict: gate.Gate) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_exactly_on_every_limit_is_accepted() -> None:
    verdict = gate.judge(SPEC, SCORES, gains())
    assert verdict.verdict == "ACCEPT"
    assert [check.name for check in verdict.checks] == [
        "exact_match", "exact_match_gain", "exact_match_gain_low", "exact_match_gain_over_few_shot",
        "exact_match_gain_over_few_shot_low", "exact_match_gain_over_production",
        "exact_match_gain_over_production_low", "general_loss",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("winner", "rejected"),
    [
        ({"exact_match": 0.799}, {"exact_match"}),
        ({"general_exact_match": 0.899}, {"general_loss"}),
        ({"exact_match": 0.6}, {"exact_match", "exact_match_gain_over_few_shot_low", "exact_match_gain_over_production",
                                "exact_match_gain_over_production_low"}),
        ({"exact_match": 0.35}, {"exact_match", "exact_match_gain", "exact_match_gain_over_few_shot",
                                 "exact_match_gain_over_few_shot_low", "exact_match_gain_over_production",
                                 "exact_match_gain_over_production_low"}),
    ],
)  # fmt: skip
def test_one_failed_check_rejects(winner: dict, rejected: set) -> None:
    scores = SCORES | {"winner": SCORES["winner"] | winner}
    verdict = gate.judge(SPEC, scores, gains(**scores))
    assert verdict.verdict == "REJECT"
    assert failed(verdict) == rejected


def test_a_gain_that_chance_could_give_is_none_unless_the_definition_lets_it() -> None:
    assert failed(gate.judge(SPEC, SCORES, gains(margin=0.02))) == {"exact_match_gain_over_production_low"}
    touching = gate.judge(SPEC, SCORES, gains(margin=0.01))
    assert failed(touching) == {"exact_match_gain_over_production_low"}, "an interval that ends at zero is not above it"
    lax = SPEC.model_copy(update={"significant": False})
    assert gate.judge(lax, SCORES, gains(margin=0.02)).verdict == "ACCEPT"


def test_nothing_is_said_of_who_is_not_there() -> None:
    scores = {name: {"exact_match": SCORES[name]["exact_match"]} for name in ("base", "winner")}
    verdict = gate.judge(SPEC, scores, {"base": gains()["base"]})
    assert [check.name for check in verdict.checks] == ["exact_match", "exact_match_gain", "exact_match_gain_low"]


@pytest.mark.parametrize(("difference", "agreement", "verdict"), [(0.05, 0.95, "ACCEPT"), (0.06, 1, "REJECT"),
                                                                  (0, 0.9, "REJECT")])  # fmt: skip
def test_a_merge_that_answers_otherwise_rejects(difference: float, agreement: float, verdict: str) -> None:
    before = gate.judge(SPEC, SCORES, gains())
    assert gate.judge_merge(SPEC, before, difference, agreement).verdict == verdict


def test_a_metric_that_these_answers_do_not_have() -> None:
    with pytest.raises(
        ValueError,
        match=r"gate\.metric: must be one of exact_match, json_validity, which these answers have, but got 'f1'",
    ):
        gate.judge(GateSpec(metric="f1"), SCORES, gains())


def test_the_metric_and_the_latency_are_the_definitions() -> None:
    spec = GateSpec(metric="json_validity", min_score=0.95, min_gain=0.4, max_latency_s=0.2)
    assert gate.judge(spec, SCORES, gains()).verdict == "ACCEPT"
    assert failed(gate.judge(spec.model_copy(update={"max_latency_s": 0.1}), SCORES, gains())) == {"latency_s"}
