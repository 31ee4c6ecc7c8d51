"""Dropout's masks: as many features as asked for, each decided by itself, and by its own trial alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainables.adapters import Adapter, Mask, mask_columns

TOKENS, FEATURES, DROPOUT = 2048, 512, 0.25


def _adapter(key: int, dropout: float = DROPOUT) -> Adapter:
    """What a mask asks of it."""
    nothing: dict[str, Any] = dict.fromkeys(Adapter._fields)
    return Adapter(**nothing | {"vector": torch.zeros(1), "dropout": dropout, "key": (7, key)})


def _kept(key: int = 0, place: int = 0, dropout: float = DROPOUT) -> torch.Tensor:
    """[TOKENS, FEATURES]"""
    columns = mask_columns(place, FEATURES, torch.device("cpu"))
    return Mask([_adapter(key, dropout)], [TOKENS]).of(columns, torch.float32)


@pytest.mark.parametrize("dropout", [1e-12, 0.05, 0.25, 0.9])
def test_as_many_are_kept_as_asked_for(dropout: float) -> None:
    kept = _kept(dropout=dropout)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(1 - dropout, abs=4 * (dropout * (1 - dropout) / kept.numel()) ** 0.5)


@pytest.mark.parametrize("dimension", [0, 1], ids=["features", "tokens"])
def test_each_is_decided_by_itself(dimension: int) -> None:
    """As often kept as its neighbours, no more and no less than chance has it, and together with them as often."""
    kept = _kept() if dimension == 0 else _kept().T
    drawn, count = kept.shape
    far = (kept.mean(0) - (1 - DROPOUT)) / (DROPOUT * (1 - DROPOUT) / drawn) ** 0.5
    assert float(far.square().mean()) == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    likeness = torch.corrcoef(kept.T).masked_select(~torch.eye(count, dtype=torch.bool))
    assert float(likeness.square().mean() * drawn) == pytest.approx(1, abs=0.05)
    assert float(likeness.abs().max()) < 7 / drawn**0.5


def test_passes_and_layers_have_their_own() -> None:
    first, size = _kept(), TOKENS * FEATURES
    assert torch.equal(first, _kept())
    for other in (_kept(key=1), _kept(place=1)):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 4 / size**0.5


def test_neighbours_change_nothing() -> None:
    columns = mask_columns(3, FEATURES, torch.device("cpu"))
    adapters, tokens = [_adapter(0, 0.5), _adapter(1, 0.1), _adapter(2, 0.5)], [5, 9, 3]
    together = Mask(adapters, tokens).of(columns, torch.bfloat16).split(tokens)
    for adapter, count, own in zip(adapters, tokens, together, strict=True):
        assert torch.equal(Mask([adapter], [count]).of(columns, torch.bfloat16), own)
