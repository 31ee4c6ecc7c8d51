"""How much of each source goes in, by caps and weights, and what share each tag then has. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from trainables.data.formats import Example
from trainables.data.quality import Finding
from trainables.spec import ShareSpec, SourceSpec


def mix(sources: Sequence[SourceSpec], examples: Sequence[Sequence[Example]], seed: int) -> list[list[Example]]:
    """Of each source's examples those that go in, in their order: first its cap, then the weights.

    Weighted sources stand to one another as their weights, as many as there can be without repeating an example.
    """
    wanted = amounts(sources, [len(group) for group in examples])
    return [
        _draw(group, count, f"{seed}:{index}")
        for index, (group, count) in enumerate(zip(examples, wanted, strict=True))
    ]


def amounts(sources: Sequence[SourceSpec], available: Sequence[int]) -> list[int]:
    """Examples to take from each source."""
    capped = [min(count, source.max_examples or count) for source, count in zip(sources, available, strict=True)]
    whole = min(
        (count / source.weight for source, count in zip(sources, capped, strict=True) if source.weight), default=0
    )
    return [
        count if source.weight is None else min(count, round(whole * source.weight))
        for source, count in zip(sources, capped, strict=True)
    ]


def _draw(group: Sequence[Example], count: int, seed: str) -> list[Example]:
    """``count`` of a group by a seed of the source's own: a change to one source does not change the others."""
    chosen = sorted(random.Random(seed).sample(range(len(group)), count))
    return [group[index] for index in chosen]


def check_shares(counts: Mapping[str, int], limits: Mapping[str, ShareSpec]) -> Iterator[Finding]:
    """Which tags have more or less of the training split than they may."""
    total = sum(counts.values())
    for tag, limit in limits.items():
        count = counts.get(tag, 0)
        share = count / total if total else 0.0
        if not limit.min <= share <= limit.max:
            bound = f"at most {limit.max:.0%}" if share > limit.max else f"at least {limit.min:.0%}"
            yield Finding(
                "share",
                "error",
                count,
                f"training examples are tagged {tag}, {share:.1%} of {total:,}, but data.shares.{tag} allows {bound}; "
                "change the weight or max_examples of its sources",
            )
