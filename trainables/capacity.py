"""How many trials one device holds at once: the memory model of a shared-base engine. Values in, a number out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of an engine with K slots: ``base + scratch + K * (slot + activations)``.

    PACKED_TRAINING.md's ``M = B + D + sum of slots + T * s + CE``, with T the sum of the largest batch that each slot
    can bring: batches seldom meet their largest at once, so this is an upper bound. The bytes a token come from a
    probe (``trainables/probe.py``); everything else is counted.
    """

    base: int
    """Frozen weights, with embeddings and head."""
    scratch: int
    """Of a pass, whatever its size: the largest layer dequantised, and one chunk of logits."""
    slot: int
    """Of the largest adapter searched: weights, gradient, moments, best weights; on a GPU its part of a stack too."""
    token: float
    """Activations that a training pass keeps for one token, and what a stack pads on a GPU."""
    eval_token: float
    """What an evaluation pass needs for one token."""
    batch_tokens: int
    """In the largest training batch of one trial."""
    eval_batch_tokens: int
    """In its largest evaluation batch."""
    dequantised: int
    """Of all 4-bit layers in the type that passes compute in, for an engine with memory to spare."""

    @property
    def activations(self) -> float:
        """Bytes of one slot's largest pass."""
        return max(self.token * self.batch_tokens, self.eval_token * self.eval_batch_tokens)

    @property
    def for_answers(self) -> int:
        """Bytes beside it for an engine that asks its adapters: a base to answer with, and as much for its answers."""
        return 2 * self.base

    def needed(self, slots: int) -> int:
        """Bytes with so many slots."""
        return round(self.base + self.scratch + slots * (self.slot + self.activations))

    def slots(self, limit: float) -> int:
        """Slots that fit into ``limit`` bytes; 0 where not even one does."""
        room = limit - self.base - self.scratch
        return max(0, int(room // (self.slot + self.activations)))

    def keeps_dequantised(self, slots: int, limit: float) -> bool:
        """Whether so many slots leave room to keep the base dequantised."""
        return self.needed(slots) + self.dequantised <= limit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
