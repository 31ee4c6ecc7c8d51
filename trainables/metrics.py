"""What answers are worth, by kind of task: metrics of each answer, and those that only all together have. Pure.

Every metric but the losses and lengths is a share, higher is better. Precision, recall and F1 come from scikit-learn,
ROUGE from rouge-score, BLEU from sacrebleu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from trainables.answers import Kind, folded, json_object


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


@dataclass(frozen=True)
class Scores:
    """A contestant on the test split, and on the general set where there is one."""

    kind: Kind
    metrics: dict[str, float]
    answers: list[Answer]
    general_answers: list[Answer] = field(default_factory=list)
    shots: int = 0
    """Examples that stood before each prompt."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Scores:
        """What ``as_dict`` gave."""
        sets = {name: [Answer(**one) for one in stored[name]] for name in ("answers", "general_answers")}
        return cls(**stored | sets)


def measure(kind: Kind, answers: Sequence[Answer], fields: Sequence[str] | None = None) -> dict[str, float]:
    """Every metric of this kind over all answers.

    Args:
        fields: keys that a valid JSON answer has, all and no other; None: any JSON object is valid.
    """
    if not answers:
        return {}
    single = {name: float(np.nanmean(values)) for name, values in each(kind, answers, fields).items()}
    together = {name: function(answers) for name, function in _TOGETHER[kind].items()}
    sizes = {
        "answer_tokens": float(np.mean([one.tokens for one in answers])),
        "latency_s": float(np.mean([one.seconds for one in answers])),
    }
    return {name: round(value, 6) for name, value in (single | together | sizes).items()}


def each(kind: Kind, answers: Sequence[Answer], fields: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """By metric, the value of each answer, [answers]: the metric of all of them is their mean."""
    rows = [_EACH[kind](answer, fields) for answer in answers]
    wanted = {name for row in rows for name in row}
    # a field that an expected answer does not have counts for nothing there
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in sorted(wanted)} if rows else {}


def joint(kind: Kind) -> list[str]:
    """Metrics of this kind that are no means over answers."""
    return list(_TOGETHER[kind])


def together(metric: str, answers: Sequence[Answer]) -> float:
    """A metric that is no mean over answers."""
    return next(functions[metric] for functions in _TOGETHER.values() if metric in functions)(answers)


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to what was expected, white space at both ends aside."""
    return round(float(np.mean([equal(one) for one in answers])), 6) if answers else 0.0


def agreement(left: Sequence[Answer], right: Sequence[Answer]) -> float:
    """Share of prompts to which two models gave the same answer."""
    pairs = list(zip(left, right, strict=True))
    return round(sum(one.answer == other.answer for one, other in pairs) / len(pairs), 6) if pairs else 1.0


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


_EACH: dict[Kind, Callable[[Answer, Any], dict[str, float]]] = {
    "classification": _classified,
    "extraction": _extracted,
    "generation": _generated,
}

_TOGETHER: dict[Kind, dict[str, Callable[[Sequence[Answer]], float]]] = {
    "classification": {
        "precision": _macro("precision_score"),
        "recall": _macro("recall_score"),
        "f1": _macro("f1_score"),
    },
    "extraction": {},
    "generation": {"bleu": _bleu},
}


@lru_cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def equal(one: Answer) -> float:
    """1 for an answer that is what was expected, white space at both ends aside."""
    return float(one.answer.strip() == one.expected.strip())
