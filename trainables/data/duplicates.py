"""Exact and near duplicates among examples, so that no test example has a twin in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash
from datasketch import MinHash, MinHashLSH

SHINGLE, PERMUTATIONS = 5, 128

_WEIGHTS = (0.05, 0.95)
"""Of pairs proposed in vain and of pairs missed: the former cost a comparison, the latter leave a twin in training."""


@dataclass(frozen=True)
class Duplicate:
    """Text ``index`` repeats the earlier text ``of``; ``similarity`` is their Jaccard similarity in shingles."""

    index: int
    of: int
    similarity: float


def shingles(text: str) -> set[str]:
    """All runs of ``SHINGLE`` characters, case and white space folded; a shorter text is one shingle."""
    folded = " ".join(text.lower().split())
    return {folded[start : start + SHINGLE] for start in range(max(1, len(folded) - SHINGLE + 1))}


def find_duplicates(texts: Sequence[str], threshold: float) -> Iterator[Duplicate]:
    """Every text that repeats an earlier, kept one: exactly, or with a Jaccard similarity of at least ``threshold``.

    MinHash-LSH proposes the pairs; the similarity itself is then computed from the shingles, so the threshold is
    exact for each pair proposed. Beside the texts there is one sketch at a time and the index of those kept.
    """
    lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=_WEIGHTS)
    kept: dict[str, int] = {}
    for index, (text, sketch) in enumerate(zip(texts, _sketches(texts), strict=True)):
        if text in kept:
            yield Duplicate(index, kept[text], 1.0)
            continue
        of, similarity = _closest(texts, shingles(text), lsh.query(sketch))
        if of is not None and similarity >= threshold:
            yield Duplicate(index, of, round(similarity, 4))
            continue
        kept[text] = index
        lsh.insert(index, sketch, check_duplication=False)


def _sketches(texts: Sequence[str]) -> Iterator[MinHash]:
    encoded = ([shingle.encode() for shingle in shingles(text)] for text in texts)
    return MinHash.generator(encoded, num_perm=PERMUTATIONS, seed=1, scheme="affine32", hashfunc=xxhash.xxh32_intdigest)


def _closest(texts: Sequence[str], own: set[str], candidates: Sequence[int]) -> tuple[int | None, float]:
    best, closest = None, 0.0
    for index in sorted(candidates):
        other = shingles(texts[index])
        shared = len(own & other)
        similarity = shared / (len(own) + len(other) - shared)
        if similarity > closest:
            best, closest = index, similarity
    return best, closest
