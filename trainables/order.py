"""The order in which a trial sees its examples: from its own seed alone, and the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from trainables.spec import SamplingStrategy

_POOL = 50
"""Batches that are sorted by length together, as transformers' LengthGroupedSampler has it."""


def epoch_order(lengths: Sequence[int], batch: int, strategy: SamplingStrategy, seed: int, epoch: int) -> list[int]:
    """Indices of one epoch; each consecutive ``batch`` of them is one optimizer step.

    ``group_by_length`` puts examples of similar length into one batch, which saves padding. Unlike transformers'
    sampler, it then shuffles the batches: sorted ones would teach a mixture of sources one source after the other.

    Args:
        lengths: tokens of each example.
        epoch: counts from 0; every epoch has an order of its own.
    """
    random = numpy.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if strategy == "random":
        return order.tolist()
    pool = _POOL * batch
    by_length = [
        example
        for start in range(0, len(order), pool)
        for example in sorted(order[start : start + pool].tolist(), key=lambda example: -lengths[example])
    ]
    whole = len(lengths) // batch  # a short last batch has to stay the last
    batches = [by_length[k * batch : (k + 1) * batch] for k in random.permutation(whole)]
    return [example for one in batches for example in one] + by_length[whole * batch :]
