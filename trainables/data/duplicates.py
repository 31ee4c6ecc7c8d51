"""Exact and near duplicates among examples, so that no test example has a twin in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
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
    """Every text that repeats an earlier one: exactly, or with a Jaccard similarity of at least ``threshold``.

    MinHash with locality-sensitive hashing (datasketch's sketches and its choice of bands) proposes the pairs; the
    similarity itself is then computed from the shingles, so the threshold is exact for each pair proposed. First come
    the exact repeats, each of the first text of its kind, then the near ones among those.
    """
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if (of := first.setdefault(text, index)) != index:
            yield Duplicate(index, of, 1.0)
    distinct = list(first.values())
    del first
    earlier = _Earlier(_bands(texts, distinct, threshold))
    for index, candidates in enumerate(earlier):
        own = shingles(texts[distinct[index]]) if candidates else set()
        near, similarity = _closest(texts, own, [distinct[candidate] for candidate in candidates])
        if near is not None and similarity >= threshold:
            earlier.forget(index)
            yield Duplicate(distinct[index], near, round(similarity, 4))


class _Earlier:
    """For each text in turn those before it that agree with it in a band and have not been forgotten.

    A chain a band from each text to the one before it: 4 bytes a text and band, where dictionaries and sets, as
    datasketch's own index in memory, take some 300.

    Args:
        bands: keys [texts, bands].
    """

    def __init__(self, bands: np.ndarray) -> None:
        self.before = np.full(bands.shape[::-1], -1, dtype=np.int32)
        for chain, keys in zip(self.before, bands.T, strict=True):
            order = np.argsort(keys, kind="stable")
            same = keys[order[1:]] == keys[order[:-1]]
            chain[order[1:][same]] = order[:-1][same]
        self.forgotten = np.zeros(len(bands), dtype=bool)

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(len(self.forgotten)):
            yield sorted({found for chain in self.before for found in self._chained(chain, index)})

    def forget(self, index: int) -> None:
        self.forgotten[index] = True

    def _chained(self, chain: np.ndarray, index: int) -> Iterator[int]:
        """Along one chain. A forgotten text is passed by once and for all: the one before it is not forgotten."""
        last = chain[index]
        if last >= 0 and self.forgotten[last]:
            chain[index] = last = chain[last]
        while last >= 0:
            yield int(last)
            last = chain[last]


def _bands(texts: Sequence[str], distinct: Sequence[int], threshold: float) -> np.ndarray:
    """One key a text and band, [distinct, bands]: texts that agree in a band are proposed as a pair."""
    ranges = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=_WEIGHTS).hashranges
    keys = np.empty((len(distinct), len(ranges)), dtype=np.uint64)
    encoded = ([shingle.encode() for shingle in shingles(texts[index])] for index in distinct)
    sketches = MinHash.generator(
        encoded, num_perm=PERMUTATIONS, seed=1, scheme="affine32", hashfunc=xxhash.xxh32_intdigest
    )
    for row, sketch in zip(keys, sketches, strict=True):
        row[:] = [xxhash.xxh3_64_intdigest(sketch.hashvalues[start:end].tobytes()) for start, end in ranges]
    return keys


def _closest(texts: Sequence[str], own: set[str], candidates: Sequence[int]) -> tuple[int | None, float]:
    best, closest = None, 0.0
    for index in candidates:
        other = shingles(texts[index])
        shared = len(own & other)
        similarity = shared / (len(own) + len(other) - shared)
        if similarity > closest:
            best, closest = index, similarity
    return best, closest
