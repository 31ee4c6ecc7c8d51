"""What kind of thing an answer is: a label, a JSON object, or free text. Pure; data checks and metrics ask it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["classification", "extraction", "generation"]

USUAL = 0.9
"""What this share of answers are, they are taken to be meant as."""

LABEL_LENGTH, _LABEL_KINDS, _TIMES = 40, 20, 5
"""Answers are labels where nearly all are at most so long, there are at most so many different ones, and each comes so
often on average."""


def kind_of(answers: Sequence[str]) -> Kind:
    """What kind of task has these expected answers."""
    if mostly([json_object(text) is not None for text in answers]):
        return "extraction"
    return "classification" if are_labels(answers) else "generation"


def are_labels(answers: Sequence[str]) -> bool:
    """Whether an answer is one of a few."""
    short = [text for text in answers if len(text) <= LABEL_LENGTH]
    kinds = {folded(text) for text in short}
    return mostly([len(text) <= LABEL_LENGTH for text in answers]) and len(kinds) <= min(
        _LABEL_KINDS, len(short) / _TIMES
    )


def mostly(flags: Sequence[bool]) -> bool:
    return sum(flags) >= USUAL * len(flags) > 0


def json_object(text: str) -> dict[str, Any] | None:
    """The object that ``text`` is, if it is one and nothing else."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def folded(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())
