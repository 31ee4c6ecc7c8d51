"""Blind reviews: which answers a person sees, in which order, and what of their scores is kept. No web in here."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from cluster import files, paths
from trainables.metrics import Answer, Scores

SIDES = ("base", "winner")
Label = Literal["A", "B"]


@dataclass(frozen=True)
class Sheet:
    """One prompt with two answers. Who gave which, the reviewer does not learn."""

    sheet_id: str
    """Drawn anew each time, so that it tells nothing."""
    key: str
    prompt: str
    expected: str
    answers: Mapping[Label, str]
    whose: Mapping[Label, str]


def sheets(run_id: str, scored: Mapping[str, Scores], count: int, seed: int) -> list[Sheet]:
    """The prompts that are still to be reviewed, of ``count`` drawn by seed from the test split; sides by chance."""
    pairs = list(zip(*(scored[side].answers for side in SIDES), strict=True))
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    done = {entry["key"] for entry in _entries(run_id)}
    return [_sheet(*pairs[index]) for index in drawn if _key(*pairs[index]) not in done]


def _sheet(base: Answer, winner: Answer) -> Sheet:
    first, second = secrets.SystemRandom().sample([("base", base.answer), ("winner", winner.answer)], 2)
    return Sheet(
        secrets.token_hex(8),
        _key(base, winner),
        base.prompt,
        base.expected,
        {"A": first[1], "B": second[1]},
        {"A": first[0], "B": second[0]},
    )


def _key(base: Answer, winner: Answer) -> str:
    """Of what was reviewed: a review holds for these very answers and no other."""
    return hashlib.sha256("\0".join([base.prompt, base.answer, winner.answer]).encode()).hexdigest()[:16]


def keep(run_id: str, sheet: Sheet, scores: Mapping[Label, int], better: str, reviewer: str) -> None:
    """Write down what a reviewer said of one sheet.

    Args:
        better: ``A``, ``B`` or ``tie``.

    Raises:
        ValueError: a score is not from 1 to 5, or ``better`` is none of the three.
    """
    for label, score in scores.items():
        if not 1 <= score <= 5:
            raise ValueError(f"the score of {label} must be from 1 to 5, but got {score}")
    if better not in ("A", "B", "tie"):
        raise ValueError(f"'better' must be A, B or tie, but got {better!r}")
    entry = {
        "key": sheet.key,
        "prompt": sheet.prompt,
        "scores": {sheet.whose[label]: score for label, score in scores.items()},
        "better": "tie" if better == "tie" else sheet.whose["A" if better == "A" else "B"],
        "reviewer": reviewer,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_json(paths.review_file(run_id), [*_entries(run_id), entry])


def _entries(run_id: str) -> list[dict[str, Any]]:
    file = paths.review_file(run_id)
    return files.read_json(file) if file.exists() else []


def summary(run_id: str, scored: Mapping[str, Scores]) -> dict[str, Any] | None:
    """How many prompts people reviewed, the average score of each side, and who was preferred how often.

    Only reviews of answers that the run has now count: another trial may have been promoted since.
    """
    if not all(side in scored for side in SIDES):
        return None
    there = {_key(*pair) for pair in zip(*(scored[side].answers for side in SIDES), strict=True)}
    entries = [entry for entry in _entries(run_id) if entry["key"] in there]
    if not entries:
        return None
    preferred = Counter(entry["better"] for entry in entries)
    return {
        "reviews": len(entries),
        "reviewers": sorted({entry["reviewer"] for entry in entries}),
        "scores": {side: _mean([entry["scores"][side] for entry in entries]) for side in SIDES},
        "better": {name: preferred[name] for name in (*SIDES, "tie")},
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
