"""Exact and near duplicates among examples, so that no test example has a twin in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

SHINGLE, PERMUTATIONS = 5, 128


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


def find_duplicates(texts: Sequence[str], threshold: float) -> list[Duplicate]:
    """Every text that repeats an earlier, kept one: exactly, or with a Jaccard similarity of at least ``threshold``.

    MinHash-LSH proposes the pairs; the similarity itself is then computed from the shingles, so the threshold is
    exact for each pair proposed.
    """
    lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[str, int] = {}
    duplicates = []
    for index, (text, sketch) in enumerate(zip(texts, _sketches(texts), strict=True)):
        if text in kept:
            duplicates.append(Duplicate(index, kept[text], 1.0))
            continue
        of, similarity = _closest(texts, shingles(text), lsh.query(sketch))
        if of is not None and similarity >= threshold:
            duplicates.append(Duplicate(index, of, round(similarity, 4)))
            continue
        kept[text] = index
        lsh.insert(index, sketch)
    return duplicates


def _sketches(texts: Sequence[str]) -> list[MinHash]:
    encoded = ([shingle.encode() for shingle in shingles(text)] for text in texts)
    return MinHash.bulk(encoded, num_perm=PERMUTATIONS, seed=1)


def _closest(texts: Sequence[str], own: set[str], candidates: Sequence[int]) -> tuple[int | None, float]:
    if not candidates:
        return None, 0.0
    others = [shingles(texts[index]) for index in candidates]
    similarities = [len(own & other) / len(own | other) for other in others]
    best = int(np.argmax(similarities))
    return candidates[best], similarities[best]
