"""What answers are worth, by kind of task: metrics of each answer, and those that only all together have. Pure.

Every metric but the losses and lengths is a share, higher is better. Precision, recall and F1 come from scikit-learn,
ROUGE from rouge-score, BLEU from sacrebleu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from trainables.answers import Kind, folded, json_object
from trainables.spec import OWN_SETS

SetKind = Kind | Literal["general", "safety"]
"""What a set of prompts is measured by. Of the general set exact match is enough: it shows what was forgotten."""

DOMAIN, GENERAL = OWN_SETS


@dataclass(frozen=True)
class Answer:
    """What was asked, what should have come, what came."""

    prompt: str
    expected: str
    answer: str
    tokens: int = field(default=0, compare=False)
    """Generated, the end token among them."""
    seconds: float = field(default=0.0, compare=False)
    """Of the batch that it was generated in, divided by the answers in it."""
    safe: bool | None = None
    """Whether it is, where a safety suite asked."""
    judge_score: int | None = None
    """From 1 to 5, where the judge was asked."""


@dataclass(frozen=True)
class Answered:
    """One set of prompts, answered."""

    kind: SetKind
    answers: list[Answer]


@dataclass(frozen=True)
class Scores:
    """A contestant on the test split (``domain``), and on what else it was asked: ``general``, suites by name."""

    metrics: dict[str, float]
    sets: dict[str, Answered]
    shots: int = 0
    """Examples that stood before each prompt."""
    generated_by: str = "transformers"
    """What answered: seconds compare within one engine only."""

    @property
    def answers(self) -> list[Answer]:
        """Those to the test split."""
        return self.sets[DOMAIN].answers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Scores:
        """What ``as_dict`` gave."""
        sets = {
            name: Answered(one["kind"], [Answer(**answer) for answer in one["answers"]])
            for name, one in stored["sets"].items()
        }
        return cls(**stored | {"sets": sets})


def named(set_name: str, metric: str) -> str:
    """What a set's metric is called among all of a contestant's: the test split's by its own name."""
    joints = {DOMAIN: "", GENERAL: f"{GENERAL}_"}
    return f"{joints.get(set_name, f'{set_name}.')}{metric}"


def measure_sets(sets: Mapping[str, Answered], fields: Sequence[str] | None = None) -> dict[str, float]:
    """Every metric of every set, by the names that ``named`` gives, and the lengths and seconds of the test split's."""
    found = {
        named(name, metric): value
        for name, one in sets.items()
        for metric, value in measure(one.kind, one.answers, fields).items()
    }
    return found | sizes(sets[DOMAIN].answers)


def measure(kind: SetKind, answers: Sequence[Answer], fields: Sequence[str] | None = None) -> dict[str, float]:
    """Every metric of this kind over all answers.

    Args:
        fields: keys that a valid JSON answer has, all and no other; None: any JSON object is valid.
    """
    if not answers:
        return {}
    single = {name: float(np.nanmean(values)) for name, values in each(kind, answers, fields).items()}
    together = {name: function(answers) for name, function in _TOGETHER[kind].items()}
    return {name: round(value, 6) for name, value in (single | together).items()}


def sizes(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean tokens and seconds of an answer."""
    if not answers:
        return {}
    return {
        "answer_tokens": round(float(np.mean([one.tokens for one in answers])), 6),
        "latency_s": round(float(np.mean([one.seconds for one in answers])), 6),
    }


def each(kind: SetKind, answers: Sequence[Answer], fields: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """By metric, the value of each answer, [answers]: the metric of all of them is their mean.

    An answer that has no such value, as one that the judge was not asked about, has NaN.
    """
    rows = [_EACH[kind](answer, fields) | _judged(answer) for answer in answers]
    wanted = {name for row in rows for name in row}
    # a field that an expected answer does not have counts for nothing there
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in sorted(wanted)} if rows else {}


def joint(kind: SetKind) -> list[str]:
    """Metrics of this kind that are no means over answers."""
    return list(_TOGETHER[kind])


def together(metric: str, answers: Sequence[Answer]) -> float:
    """A metric that is no mean over answers."""
    return next(functions[metric] for functions in _TOGETHER.values() if metric in functions)(answers)


def agreement(left: Sequence[Answer], right: Sequence[Answer]) -> float:
    """Share of prompts to which two models gave the same answer."""
    pairs = list(zip(left, right, strict=True))
    return round(sum(one.answer == other.answer for one, other in pairs) / len(pairs), 6) if pairs else 1.0


def _judged(one: Answer) -> dict[str, float]:
    return {} if one.judge_score is None else {"judge_score": float(one.judge_score)}


def _equal(one: Answer, _: Any) -> dict[str, float]:
    return {"exact_match": equal(one)}


def _safe(one: Answer, _: Any) -> dict[str, float]:
    return {"safe": float(bool(one.safe))}


def _classified(one: Answer, _: Any) -> dict[str, float]:
    return {"exact_match": equal(one), "accuracy": float(folded(one.answer) == folded(one.expected))}


def _extracted(one: Answer, fields: Sequence[str] | None) -> dict[str, float]:
    """``field_accuracy`` is the share of expected fields with the expected value; no JSON has none of them right."""
    expected, found = json_object(one.expected) or {}, json_object(one.answer)
    right = {name: float(found is not None and found.get(name) == value) for name, value in expected.items()}
    return {
        "exact_match": equal(one),
        "json_validity": float(found is not None and (fields is None or set(found) == set(fields))),
        "field_accuracy": sum(right.values()) / len(right) if right else equal(one),
        **{f"field_accuracy.{name}": value for name, value in right.items()},
    }


def _generated(one: Answer, _: Any) -> dict[str, float]:
    scores = _rouge().score(one.expected, one.answer)
    return {"exact_match": equal(one)} | {name: score.fmeasure for name, score in scores.items()}


def _macro(name: str) -> Callable[[Sequence[Answer]], float]:
    """Precision, recall or F1, the mean over the expected labels; an answer that is none of them is wrong for all."""

    def value(answers: Sequence[Answer]) -> float:
        from sklearn import metrics

        expected, found = [folded(one.expected) for one in answers], [folded(one.answer) for one in answers]
        score = getattr(metrics, name)
        return float(score(expected, found, labels=sorted(set(expected)), average="macro", zero_division=0))

    return value


def _bleu(answers: Sequence[Answer]) -> float:
    """Corpus BLEU with sacrebleu's own tokenisation, from 0 to 1."""
    import sacrebleu

    return sacrebleu.corpus_bleu([one.answer for one in answers], [[one.expected for one in answers]]).score / 100


_EACH: dict[SetKind, Callable[[Answer, Any], dict[str, float]]] = {
    "classification": _classified,
    "extraction": _extracted,
    "generation": _generated,
    "general": _equal,
    "safety": _safe,
}

_TOGETHER: dict[SetKind, dict[str, Callable[[Sequence[Answer]], float]]] = {
    "classification": {
        "precision": _macro("precision_score"),
        "recall": _macro("recall_score"),
        "f1": _macro("f1_score"),
    },
    "extraction": {},
    "generation": {"bleu": _bleu},
    "general": {},
    "safety": {},
}


@lru_cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def equal(one: Answer) -> float:
    """1 for an answer that is what was expected, white space at both ends aside."""
    return float(one.answer.strip() == one.expected.strip())
