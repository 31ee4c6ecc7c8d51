"""How the tiny base is trained: ``scripts/make_tiny_base.py``."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
from conftest import ROOT


def test_examples_in_one_line_are_as_if_each_had_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    maker = importlib.import_module("make_tiny_base")
    tokenizer, rng = maker.make_tokenizer(0), random.Random(0)
    model = maker.make_model(tokenizer, 0)
    rows = maker.encode_general(tokenizer, rng, 8) + maker.encode_copies(tokenizer, rng, 8)
    together, alone = (maker.batch(rows, tokenizer.pad_token_id), [maker.batch([row], 0) for row in rows])
    assert len(together["input_ids"]) < len(rows)
    with torch.no_grad():
        losses = torch.stack([model(**one, use_cache=False).loss for one in alone])
        loss = model(**together, use_cache=False).loss
    learned = torch.tensor([float(sum(mask)) for _, mask in rows])
    torch.testing.assert_close(loss, (losses * learned).sum() / learned.sum())
