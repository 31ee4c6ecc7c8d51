"""The judge over real HTTP, both protocols, with an endpoint on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_judge
import pytest

from cluster import paths
from sweeps.judge import verdicts
from trainables.metrics import Answer, Answered, Scores
from trainables.spec import EvaluationSpec, JudgeSpec

KEY = "sk-a-secret-of-this-test"
PROVIDERS = ("openai", "anthropic")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def contestant(right: int, wrong: int, safe: tuple[bool, ...] = ()) -> Scores:
    """So many right answers, then so many wrong ones."""
    answers = [Answer(f"p{n}", f"a{n}", f"a{n}" if n < right else f"not a{n}") for n in range(right + wrong)]
    sets = {"domain": Answered("generation", answers)}
    if safe:
        said = [Answer(f"s{n}", "", "I refuse" if one else "unsafe words", safe=True) for n, one in enumerate(safe)]
        sets["harm"] = Answered("safety", said)
    return Scores({"loss": 1.0}, sets)


SCORED = {"base": contestant(2, 8), "few_shot": contestant(5, 5), "winner": contestant(9, 1)}


@pytest.fixture
def evaluate() -> Callable[..., tuple[verdicts.Judgement, list[str]]]:
    """Judges ``SCORED`` by an endpoint; returns what came of it and what was logged."""

    def run(judge: fake_judge.Judge, provider: str = "openai", scored: Any = None, suites: Any = None, **fields: Any):
        address = judge.url + ("/v1" if provider == "openai" else "")
        spec = JudgeSpec(provider=provider, model="m", base_url=address, **fields)  # type: ignore[arg-type]
        lines: list[str] = []
        return verdicts.judge(EvaluationSpec(judge=spec, suites=suites or {}), scored or SCORED, lines.append), lines

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
def test_grades_and_choices_come_to_what_the_answers_are_worth(provider: str, evaluate) -> None:
    with fake_judge.serve() as judge:
        done, lines = evaluate(judge, provider)
    assert {name: scores.metrics["judge_score"] for name, scores in done.scored.items()} == {
        "base": 2.6,
        "few_shot": 3.5,
        "winner": 4.7,
    }
    assert done.scored["winner"].metrics["loss"] == 1.0, "what was measured before stays"
    assert (done.summary["judged"], done.summary["broken"], done.summary["failed"]) == (1.0, 0, 0)
    # p0 and p1 all have right, p2 to p4 not the base, p5 to p8 the winner alone, and p9 nobody, all with the same words
    assert done.summary["pairwise"]["base"] | {"low": 0, "high": 0} == {
        "wins": 7, "losses": 0, "ties": 3, "inconsistent": 0, "win_rate": 0.85, "low": 0, "high": 0,
    }  # fmt: skip
    assert done.summary["pairwise"]["few_shot"]["wins"] == 4
    assert 0.5 < done.summary["pairwise"]["base"]["low"] < 0.85
    asked = 3 * 10 + 2 * 7 + 2 * 4
    assert done.summary["questions"] == asked == len(done.verdicts)
    assert len(judge.requests) == done.summary["calls"] < asked, "equal answers to one prompt are one question"
    assert {sent.removeprefix("Bearer ") for sent in judge.keys} == {KEY}
    assert {request["max_tokens"] for request in judge.requests} == {400}
    assert {request.get("temperature") for request in judge.requests} == {0 if provider == "openai" else None}
    assert "answered" in lines[-1]


def test_nobody_is_told_whose_answer_it_is(evaluate) -> None:
    with fake_judge.serve() as judge:
        evaluate(judge)
    assert not any(word in json.dumps(judge.requests) for word in ("winner", "few_shot", '"base"'))


def test_what_was_asked_before_is_not_asked_again_and_the_key_is_written_nowhere(evaluate, tmp_path: Path) -> None:
    with fake_judge.serve() as judge:
        first, _ = evaluate(judge)
        paid = len(judge.requests)
        second, _ = evaluate(judge)
        assert len(judge.requests) == paid
        assert (second.summary["calls"], second.summary["cached"]) == (0, second.summary["questions"])
        assert second.scored == first.scored
        third, _ = evaluate(judge, rubric="Be strict.")
        assert third.summary["cached"] == third.summary["questions"] - third.summary["calls"] < first.summary["calls"]
    assert KEY not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert KEY not in json.dumps(first.as_dict())


@pytest.mark.parametrize(
    "broken",
    ["5", '{"score": 5}', '{"reason": "r", "score": 6}', '{"reason": "r", "score": "5"}',
     '{"reason": "r", "score": 5.5}', '```json\n{"reason": "r", "score": 5}\n```',
     '{"reason": "r", "score": 5, "more": 1}', ""],
)  # fmt: skip
def test_a_broken_reply_is_asked_for_again_and_counted(broken: str, evaluate) -> None:
    seen: set[str] = set()

    def stubborn(system: str, asked: dict[str, str]) -> Any:
        whole = json.dumps(asked)
        if whole in seen:
            return fake_judge.fair(system, asked)
        seen.add(whole)
        return broken

    with fake_judge.serve(stubborn) as judge:
        done, _ = evaluate(judge, scored={"winner": contestant(2, 0)}, pairwise=False, concurrency=1)
    assert (done.summary["broken"], done.summary["judged"], done.summary["calls"]) == (2, 1.0, 4)
    again = judge.requests[1]["messages"]
    assert [turn["role"] for turn in again] == ["system", "user", "assistant", "user"]
    assert "not the JSON object asked for" in again[-1]["content"]


def test_one_that_stays_broken_is_unjudged_and_kept_out_of_the_cache(evaluate, tmp_path: Path) -> None:
    with fake_judge.serve(lambda *_: "nonsense") as judge:
        done, lines = evaluate(judge, scored={"winner": contestant(3, 0)}, pairwise=False, attempts=2)
    assert (done.summary["judged"], done.summary["broken"], done.summary["calls"]) == (0.0, 6, 6)
    assert "judge_score" not in done.scored["winner"].metrics
    assert not list(paths.judge_cache().glob("*"))
    assert "0% of 3 questions answered" in lines[-1]


def test_a_judge_that_goes_by_order_is_seen_through(evaluate) -> None:
    def first(system: str, asked: dict[str, str]) -> Any:
        return {"reason": "it is first", "better": "A"} if "better" in system else {"reason": "r", "score": 3}

    with fake_judge.serve(first) as judge:
        done, _ = evaluate(judge)
    assert done.summary["pairwise"]["base"]["win_rate"] == 0.5
    assert done.summary["pairwise"]["base"]["inconsistent"] == 7
    assert done.summary["pairwise"]["base"]["ties"] == 10


def test_a_judge_that_prefers_the_base_is_not_turned_round(evaluate) -> None:
    def contrary(system: str, asked: dict[str, str]) -> Any:
        if "better" not in system:
            return {"reason": "r", "score": 3}
        wrong = [label for label in ("A", "B") if asked[label] != asked["expected answer"]]
        return {"reason": "r", "better": wrong[0] if len(wrong) == 1 else "tie"}

    with fake_judge.serve(contrary) as judge:
        done, _ = evaluate(judge)
    assert (done.summary["pairwise"]["base"]["wins"], done.summary["pairwise"]["base"]["losses"]) == (0, 7)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_is_refused_for_now_is_tried_again_and_counted(provider: str, evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [429, 500, 503]
        done, _ = evaluate(judge, provider, scored={"winner": contestant(4, 0)}, pairwise=False, concurrency=1)
    assert (done.summary["judged"], done.summary["calls"], done.summary["failed"]) == (1.0, 7, 0)


def test_one_request_that_fails_for_good_leaves_the_others(evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [500] * 5
        done, _ = evaluate(judge, scored={"winner": contestant(4, 0)}, pairwise=False, concurrency=1)
    assert (done.summary["judged"], done.summary["failed"]) == (0.75, 1)


def test_an_endpoint_that_does_not_answer_any_more_is_left_alone(evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [500] * 100
        done, lines = evaluate(judge, scored={"winner": contestant(12, 0)}, pairwise=False, concurrency=1)
    assert (done.summary["judged"], done.summary["calls"]) == (0.0, 25), "five requests with four retries each"
    assert "5 requests in a row failed" in lines[-1]


def test_failures_with_answers_between_them_stop_nothing(evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [*[500] * 20, 200, *[500] * 20]
        done, _ = evaluate(judge, scored={"winner": contestant(12, 0)}, pairwise=False, concurrency=1)
    assert (done.summary["failed"], done.summary["judged"]) == (8, pytest.approx(4 / 12, abs=1e-6))


def test_a_choice_that_was_not_made_in_both_orders_is_none(evaluate) -> None:
    def undecided(system: str, asked: dict[str, str]) -> Any:
        silent = "better" in system and (
            asked["prompt"] in ("p5", "p6") or (asked["prompt"], asked["A"]) == ("p7", "a7")
        )
        return "?" if silent else fake_judge.fair(system, asked)

    with fake_judge.serve(undecided) as judge:
        done, _ = evaluate(judge)
    found = done.summary["pairwise"]["base"]
    assert (found["wins"], found["losses"], found["ties"]) == (4, 0, 3)
    assert found["win_rate"] == pytest.approx((4 + 3 / 2) / 7, abs=1e-6)


def test_retries_count_against_the_cap(evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [429] * 100
        done, _ = evaluate(judge, max_calls=12, concurrency=1)
    assert len(judge.requests) == done.summary["calls"] == 12


@pytest.mark.parametrize("concurrency", [1, 8])
def test_calls_never_pass_their_cap(concurrency: int, evaluate) -> None:
    with fake_judge.serve() as judge:
        done, _ = evaluate(judge, max_calls=30, concurrency=concurrency)
        assert done.summary["prompts"] == 30 // 7, "three grades and two choices in both orders for a prompt"
        assert done.summary["judged"] == 1.0
    with fake_judge.serve() as judge:
        judge.failures += [429] * 12
        done, lines = evaluate(judge, max_calls=14, concurrency=concurrency, rubric="Another.")
    assert len(judge.requests) == done.summary["calls"] <= 14
    assert done.summary["judged"] < 1
    assert "max_calls 14 is reached" in lines[-1] or concurrency > 1, "several at once may all have been under way"


@pytest.mark.parametrize("concurrency", [1, 8])
def test_spend_never_passes_its_cap(concurrency: int, evaluate) -> None:
    prices = {"usd_per_million_input_tokens": 10.0, "usd_per_million_output_tokens": 100.0}
    with fake_judge.serve() as judge:
        done, lines = evaluate(judge, max_spend_usd=0.1, concurrency=concurrency, **prices)
    true_cost = len(judge.requests) * (100 * 10 + 10 * 100) / 1e6
    assert done.summary["spend_usd"] == pytest.approx(true_cost)
    assert 0.02 < true_cost <= 0.1
    assert done.summary["judged"] < 1
    assert "max_spend_usd 0.1 could be passed" in lines[-1]


def test_tokens_that_an_endpoint_does_not_tell_count_at_their_most(evaluate) -> None:
    prices = {"usd_per_million_input_tokens": 0.0, "usd_per_million_output_tokens": 100.0, "max_tokens": 50}
    with fake_judge.serve() as judge:
        judge.usage = False
        done, _ = evaluate(judge, scored={"winner": contestant(4, 0)}, pairwise=False, **prices)
        longer, _ = evaluate(judge, scored={"winner": contestant(4, 0)}, pairwise=False, rubric="Another.", **prices,
                             request={"max_tokens": None, "max_completion_tokens": 80})  # fmt: skip
    assert done.summary["spend_usd"] == pytest.approx(4 * 50 * 100 / 1e6)
    assert longer.summary["spend_usd"] == pytest.approx(4 * 80 * 100 / 1e6)


def test_fewer_calls_than_one_prompt_takes(evaluate) -> None:
    with fake_judge.serve() as judge, pytest.raises(ValueError, match=r"max_calls: must be at least 7, .* but got 6"):
        evaluate(judge, max_calls=6)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_for_good_is_one_line_without_the_key(status: int, evaluate) -> None:
    with fake_judge.serve() as judge:
        judge.failures += [status] * 4
        with pytest.raises(ValueError, match=r"evaluation\.judge: m at http://127.* refuses: .*OPENAI_API_KEY") as told:
            evaluate(judge)
    assert KEY not in str(told.value)
    assert "\n" not in str(told.value)
    assert len(judge.requests) <= 4


def test_a_check_before_anything_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with fake_judge.serve() as judge:
        verdicts.check(JudgeSpec(model="m", base_url=f"{judge.url}/v1"), 0, lines.append)
        judge.failures += [401]
        with pytest.raises(ValueError, match="refuses"):
            verdicts.check(JudgeSpec(model="m", base_url=f"{judge.url}/v1"), 0, lines.append)
        monkeypatch.delenv("OPENAI_API_KEY")
        verdicts.check(JudgeSpec(model="m", base_url=f"{judge.url}/v1"), 0, lines.append)
    assert lines == ["judge: m answers"] * 2
    with pytest.raises(ValueError, match=r"max_calls: must be at least 22, for 4 safety prompts .* but got 21"):
        verdicts.check(JudgeSpec(model="m", max_calls=21), 4, lines.append)
    with pytest.raises(ValueError, match="needs its key in the environment variable OPENAI_API_KEY"):
        verdicts.check(JudgeSpec(model="m"), 0, lines.append)
    with pytest.raises(ValueError, match="MY_KEY, which is not set"):
        verdicts.check(JudgeSpec(model="m", base_url="https://judge.example/v1", api_key_env="MY_KEY"), 0, lines.append)
    with pytest.raises(ValueError, match="does not answer"):
        verdicts.check(JudgeSpec(model="m", base_url="http://127.0.0.1:9/v1", timeout_s=2), 0, lines.append)


def test_keys_of_the_request_are_the_users(evaluate) -> None:
    with fake_judge.serve() as judge:
        request = {"temperature": None, "max_tokens": None, "max_completion_tokens": 99}
        evaluate(judge, scored={"winner": contestant(1, 0)}, pairwise=False, request=request)
    (asked,) = judge.requests
    assert asked["max_completion_tokens"] == 99
    assert not {"temperature", "max_tokens"} & set(asked)


def test_safety_is_what_rules_and_judge_both_say(evaluate) -> None:
    suites = {"harm": {"kind": "safety", "path": "unused", "judge": True}}
    scored = {"base": contestant(1, 0, (True, True)), "winner": contestant(1, 0, (True, False))}
    unruly = scored["winner"].sets["harm"].answers[0]
    scored["winner"].sets["harm"].answers.append(Answer("s2", "", unruly.answer, safe=False))
    scored["base"].sets["harm"].answers.append(Answer("s2", "", unruly.answer, safe=True))
    with fake_judge.serve() as judge:
        done, _ = evaluate(judge, scored=scored, suites=suites)
    assert [one.safe for one in done.scored["winner"].sets["harm"].answers] == [True, False, False]
    assert done.scored["base"].metrics["harm.safe"] == 1.0
    assert done.scored["winner"].metrics["harm.safe"] == pytest.approx(1 / 3, abs=1e-6)
    of_safety = [request for request in judge.requests if "is safe" in request["messages"][0]["content"]]
    assert len(of_safety) == 4, "not the one that the rules refused, and equal ones once"


@pytest.mark.parametrize("address", ["https://u:p@judge.example/v1", "https://judge.example/v1?key=x", "judge.example"])
def test_an_address_with_a_secret_or_none_at_all(address: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        JudgeSpec(model="m", base_url=address)


def test_a_cap_on_spend_needs_prices() -> None:
    with pytest.raises(ValueError, match="usd_per_million_input_tokens"):
        JudgeSpec(model="m", max_spend_usd=1.0)
