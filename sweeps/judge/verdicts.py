"""What the judge's answers come to: grades on the contestants' answers, and how often the winner was better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sweeps import comparison
from sweeps.judge.court import Court
from sweeps.judge.endpoint import Endpoint
from sweeps.judge.questions import Key, Question, most_calls_of_one_prompt, questions
from trainables import metrics
from trainables.metrics import DOMAIN, Answer, Answered, Scores
from trainables.spec import EvaluationSpec, JudgeSpec

Log = Callable[[str], None]
Found = Mapping[Key, Any]


@dataclass(frozen=True)
class Judgement:
    """The contestants with the judge's grades, and what the judge did: a summary, and every verdict."""

    scored: dict[str, Scores]
    summary: dict[str, Any]
    verdicts: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return self.summary | {"verdicts": self.verdicts}


_CONTESTANTS, _ASKED_SAFETY = 4, 3
"""At most: all of them, and all but the few-shot base."""


def check(spec: JudgeSpec, safety_prompts: int, log: Log) -> None:
    """The judge answers, and may be asked enough. Before a search: hours later would be late to find its key missing.

    Args:
        safety_prompts: that it is to judge of each contestant.

    Raises:
        ValueError: it does not; the line says why.
    """
    least = _ASKED_SAFETY * safety_prompts + most_calls_of_one_prompt(spec, _CONTESTANTS)
    if spec.max_calls < least:
        raise ValueError(
            f"evaluation.judge.max_calls: must be at least {least}, for {safety_prompts} safety prompts and one other "
            f"of every contestant, but got {spec.max_calls}"
        )
    Endpoint(spec).check()
    log(f"judge: {spec.model} answers")


def judge(evaluation: EvaluationSpec, scored: Mapping[str, Scores], log: Log) -> Judgement:
    """Ask all that the definition wants to know.

    Where the winner and another gave the same answer they are a tie, and the judge is not asked; where it chooses
    otherwise once the order is swapped they are a tie too, and counted as inconsistent.

    Raises:
        ValueError: the endpoint refuses the key, the model or a request, or ``max_calls`` allows not one prompt.
    """
    spec = evaluation.judge
    assert spec is not None, "a definition with a judge"
    wanted, court = questions(evaluation, scored), Court(Endpoint(spec))
    log(f"judge: {len(wanted)} questions to {spec.model}")
    court.ask_all(wanted, log)
    prompts = sorted({index for what, _, _, index, _ in (one.key for one in wanted) if what == "grade"})
    graded = {name: _graded(name, scores, court.found, evaluation) for name, scores in scored.items()}
    summary = _summary(spec, court, wanted) | {
        "prompts": len(prompts),
        "pairwise": _pairwise(evaluation, scored, prompts, court.found) if spec.pairwise else {},
    }
    log(_told(spec, summary))
    return Judgement(graded, summary, [_verdict(key, answer) for key, answer in court.found.items()])


def _summary(spec: JudgeSpec, court: Court, wanted: Sequence[Question]) -> dict[str, Any]:
    return {
        "model": spec.model,
        "provider": spec.provider,
        "questions": len(wanted),
        "judged": round(len(court.found) / len(wanted), 6),
        "cached": court.cached,
        "broken": court.broken,
        **court.endpoint.account.as_dict(),
    }


def _told(spec: JudgeSpec, summary: Mapping[str, Any]) -> str:
    parts = [
        f"{summary['judged']:.0%} of {summary['questions']} questions answered",
        f"{summary['calls']} calls",
        f"{summary['cached']} from the cache",
        f"{summary['broken']} broken replies",
        f"{summary['failed']} failed requests",
    ]
    parts += [f"{summary['spend_usd']:.4f} USD"] if spec.usd_per_million_output_tokens is not None else []
    parts += [f"stopped, for {summary['stopped']}"] if summary["stopped"] else []
    return f"judge: {', '.join(parts)}"


def _verdict(key: Key, answer: Any) -> dict[str, Any]:
    what, suite, contestant, prompt, swapped = key
    order = {"swapped": swapped} if what == "choice" else {}
    return {"what": what, "suite": suite, "contestant": contestant, "prompt": prompt} | order | answer.model_dump()


def _graded(name: str, scores: Scores, found: Found, evaluation: EvaluationSpec) -> Scores:
    sets = {
        suite: Answered(
            one.kind, [_with_verdict(answer, (suite, name, index), found) for index, answer in enumerate(one.answers)]
        )
        for suite, one in scores.sets.items()
    }
    return replace(scores, sets=sets, metrics=scores.metrics | metrics.measure_sets(sets, evaluation.json_fields))


def _with_verdict(answer: Answer, place: tuple[str, str, int], found: Found) -> Answer:
    """What the rules call safe is so only where the judge does not say otherwise."""
    grade, safety = found.get(("grade", *place, False)), found.get(("safety", *place, False))
    return replace(answer, judge_score=grade and grade.score, safe=safety.safe if safety else answer.safe)


def _pairwise(
    evaluation: EvaluationSpec, scored: Mapping[str, Scores], prompts: Sequence[int], found: Found
) -> dict[str, dict[str, float]]:
    """By contestant, how often the winner was better, a tie counting half, with the interval."""
    result: dict[str, dict[str, float]] = {}
    for name in [name for name in scored if name != "winner"]:
        ours, theirs = scored["winner"].answers, scored[name].answers
        outcomes = [_outcome(ours[index].answer == theirs[index].answer, name, index, found) for index in prompts]
        counts = Counter(outcomes)
        worth = {"win": 1.0, "loss": 0.0, None: np.nan}
        rate = comparison.of_means(np.array([worth.get(outcome, 0.5) for outcome in outcomes]), evaluation)
        result[name] = {
            "wins": counts["win"],
            "losses": counts["loss"],
            "ties": counts["tie"] + counts["inconsistent"],
            "inconsistent": counts["inconsistent"],
            "win_rate": rate.gain,
            "low": rate.low,
            "high": rate.high,
        }
    return result


def _outcome(same: bool, name: str, index: int, found: Found) -> str | None:
    """Of one prompt, for the winner; None where the judge did not answer in both orders."""
    if same:
        return "tie"
    first, second = (found.get(("choice", DOMAIN, name, index, swapped)) for swapped in (False, True))
    if first is None or second is None:
        return None
    one = {"A": "win", "B": "loss", "tie": "tie"}[first.better]
    other = {"A": "loss", "B": "win", "tie": "tie"}[second.better]
    return one if one == other else "inconsistent"
