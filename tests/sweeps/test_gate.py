from __future__ import annotations

import pytest

from sweeps import gate
from sweeps.definition import GateSpec, SuiteLimits
from sweeps.gate import Opinions

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
    assert gate.judge_merge(SPEC, before, SCORES, difference, agreement).verdict == verdict


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


def test_no_safety_suite_may_answer_less_safely_than_base_or_production() -> None:
    safe = {name: SCORES[name] | {"harm.safe": value} for name, value in
            (("base", 0.8), ("production", 0.9), ("winner", 0.9))}  # fmt: skip
    assert gate.judge(SPEC, SCORES | safe, gains()).verdict == "ACCEPT"
    safe["winner"] |= {"harm.safe": 0.85}
    assert failed(gate.judge(SPEC, SCORES | safe, gains())) == {"harm.safe_loss"}, "safer than the base is not enough"
    fields = {"field_accuracy.safe": 0.1, "hard.field_accuracy.safe": 0.1}
    assert failed(gate.judge(SPEC, SCORES | {"winner": SCORES["winner"] | fields}, gains())) == set()
    lax = SPEC.model_copy(update={"max_safety_loss": 0.05})
    assert gate.judge(lax, SCORES | safe, gains()).verdict == "ACCEPT"


def test_limits_on_suites_of_ones_own() -> None:
    limits = {"hard": SuiteLimits(metric="rougeL", min_score=0.5, max_loss=0.1)}
    spec = SPEC.model_copy(update={"suites": limits})
    scores = {name: one | {"hard.rougeL": 0.65} for name, one in SCORES.items()}
    scores["winner"] |= {"hard.rougeL": 0.55}
    assert gate.judge(spec, scores, gains()).verdict == "ACCEPT"
    scores["winner"] |= {"hard.rougeL": 0.45}
    assert failed(gate.judge(spec, scores, gains())) == {"hard.rougeL", "hard.rougeL_loss"}
    with pytest.raises(ValueError, match=r"gate\.suites\.hard\.metric: must be one of bleu, but got 'rougeL'"):
        gate.judge(spec, SCORES | {"winner": SCORES["winner"] | {"hard.bleu": 1.0}}, gains())


def test_a_suite_that_only_the_merged_model_is_put_through_is_checked_then_and_once() -> None:
    spec = SPEC.model_copy(update={"suites": {"lm": SuiteLimits(metric="mine.acc", min_score=0.5)}})
    before = gate.judge(spec, SCORES, gains())
    assert before.verdict == "ACCEPT"
    with pytest.raises(ValueError, match=r"gate\.suites\.lm: the run has no scores"):
        gate.judge_merge(spec, before, SCORES, 0, 1)
    scores = {name: one | {"lm.mine.acc": 0.4} for name, one in SCORES.items()}
    after = gate.judge_merge(spec, before, scores, 0, 1)
    assert failed(after) == {"lm.mine.acc"}
    again = gate.judge_merge(spec, gate.judge(spec, scores, gains()), scores, 0, 1)
    assert sorted(check.name for check in again.checks) == sorted(check.name for check in after.checks)


def test_a_judge_has_to_be_content_and_to_have_answered() -> None:
    graded = SCORES | {"winner": SCORES["winner"] | {"judge_score": 4.0}}
    assert gate.judge(SPEC, graded, gains(), Opinions(judged=0.9)).verdict == "ACCEPT"
    assert failed(gate.judge(SPEC, graded, gains(), Opinions(judged=0.89))) == {"judged"}
    graded["winner"] |= {"judge_score": 3.99}
    assert failed(gate.judge(SPEC, graded, gains(), Opinions(judged=1.0))) == {"judge_score"}
    assert failed(gate.judge(SPEC, SCORES, gains(), Opinions(judged=0.0))) == {"judged", "judge_score"}
    assert gate.judge(SPEC, graded, gains()).verdict == "ACCEPT", "no judge, no grade that counts"
    choosy = SPEC.model_copy(update={"min_win_rate": 0.6, "min_judge_score": 1.0})
    chosen = Opinions(judged=1.0, win_rates={"base": 0.9, "few_shot": 0.59})
    assert failed(gate.judge(choosy, graded, gains(), chosen)) == {"win_rate_over_few_shot"}


def test_a_review_that_is_asked_for_has_to_be_there() -> None:
    spec = SPEC.model_copy(update={"min_review_score": 4.0, "min_reviews": 3})
    assert failed(gate.judge(spec, SCORES, gains())) == {"reviews", "review_score"}
    assert failed(gate.judge(spec, SCORES, gains(), Opinions(reviews=2, review_score=5.0))) == {"reviews"}
    assert gate.judge(spec, SCORES, gains(), Opinions(reviews=3, review_score=4.0)).verdict == "ACCEPT"
