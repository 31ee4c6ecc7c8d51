"""Personal data and secrets in examples: reported, redacted, or their examples left out.

What was found is never handed on: counts and findings name its kind and its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.personal import Recogniser, Redaction
from trainables.data.formats import Example
from trainables.spec import PersonalDataSpec


@dataclass
class Account:
    """What was found in how many examples."""

    values: Counter[str] = field(default_factory=Counter)
    """Found values, by entity."""
    places: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    """Every example with a finding: where it stands, and how many of which entity."""


def look_through(examples: Iterable[Example], spec: PersonalDataSpec) -> tuple[list[Example], Account]:
    """Examples as ``spec.action`` (any but ``off``) leaves them, and the account of what was found in them."""
    recogniser, account, left = Recogniser(spec.entities, spec.regions), Account(), []
    for example in examples:
        redact = Redaction(recogniser)
        redacted = example.with_texts(redact)
        if counts := redact.counts:
            account.values.update(counts)
            account.places.append((example.place, dict(counts)))
        if not counts or spec.action != "reject":
            left.append(redacted if spec.action == "redact" else example)
    return left, account
