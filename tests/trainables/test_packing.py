"""What one pass over many trials computes: for each of them what stock transformers and calculus say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables import base
from trainables.contract import TrialConfig
from trainables.data import prepare
from trainables.engine import Engine
from trainables.packing import Example, pack
from trainables.slots import Slot
from trainables.spec import BaseModelSpec, DataSpec, SourceSpec, TrainingSpec

Admit = Callable[..., Slot]


@pytest.fixture
def engine(home: Path) -> Engine:
    return _engine(home)


@pytest.fixture
def admit(engine: Engine) -> Admit:
    return lambda name, **training: _admit(engine, name, **training)


def _engine(home: Path, **options: Any) -> Engine:
    spec = BaseModelSpec(model_name_or_path=str(home / "bases" / "tiny"))
    tickets = SourceSpec(path=str(home / "sources" / "tickets" / "tickets.jsonl"))
    data = prepare.prepare(DataSpec(sources=(tickets,), max_length=128, min_examples=50), base.load_tokenizer(spec))
    return Engine(spec, data, **options)


def _admit(engine: Engine, name: str, **training: Any) -> Slot:
    """A trial with an adapter that does something already: a fresh one's B is zero."""
    values = {"r": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 4} | training
    slot = engine.admit(TrialConfig(name, engine.spec, TrainingSpec(**values), "", 4))
    with torch.no_grad():
        slot.vector.add_(torch.randn(slot.vector.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return slot


def _loss(engine: Engine, slot: Slot) -> torch.Tensor:
    """Summed loss of the slot's next batch, in training mode."""
    engine.model.train()
    rows = [engine.train[i] for i in slot.micro_batches()[0]]
    with torch.no_grad():
        return engine._losses(pack([(slot.adapter(0), rows)], engine.device))[0]


def test_examples_of_unequal_length_are_what_stock_transformers_computes_one_by_one(
    home: Path, engine: Engine, admit: Admit
) -> None:
    """Padding neither attends nor counts, positions start anew, and neighbours are not seen."""
    stock = base.load_model(engine.spec).train()  # without gradients bitsandbytes takes a coarser path on a CPU
    slots = [admit("a"), admit("b", r=16, seed=3)]
    rows = sorted(engine.train, key=lambda row: len(row.input_ids))
    mixed = [rows[0], rows[-1], rows[len(rows) // 2]]
    for slot in slots:
        slot.vector.zero_()  # an adapter that adds nothing: the base itself
    packed = pack([(slot.adapter(None), mixed) for slot in slots], engine.device)
    with torch.no_grad():
        found = [float(loss) for loss in engine._losses(packed)]
    wanted = 0.0
    for row in mixed:
        logits = stock(row.input_ids[None]).logits[0, :-1].log_softmax(-1)
        learned = row.labels[1:] != -100
        wanted -= logits[learned].gather(1, row.labels[1:][learned][:, None]).sum().item()
    assert found == [pytest.approx(wanted, rel=1e-5)] * 2


def test_an_examples_last_token_predicts_nothing_of_the_next_one(engine: Engine, admit: Admit) -> None:
    """Also where every token is learned, the first ones too, as in plain text."""
    lengths = {"a": (5, 3), "b": (2, 7, 4)}
    rows = {name: [Example(ids, ids) for ids in map(_some_ids, own)] for name, own in lengths.items()}
    packed = pack([(admit(name).adapter(None), own) for name, own in rows.items()], engine.device)
    assert packed.learned == [4 + 2, 1 + 6 + 3]
    for part, own in zip(packed.parts, rows.values(), strict=True):
        assert torch.equal(part.next_ids, torch.cat([row.input_ids[1:] for row in own]))
    following = packed.input_ids[packed.predicting + 1]
    assert torch.equal(following, torch.cat([part.next_ids for part in packed.parts]))


def test_a_neighbour_that_is_no_number_reaches_nobody(engine: Engine, admit: Admit) -> None:
    broken, watched = admit("broken"), admit("watched", per_device_train_batch_size=3)
    expected = engine.learn([watched])["watched"]
    gradient = watched.vector.grad.clone()
    with torch.no_grad():
        broken.vector.fill_(torch.nan)
    assert engine.learn([broken, watched])["watched"] == expected
    assert torch.equal(watched.vector.grad, gradient)


def _some_ids(length: int) -> torch.Tensor:
    return torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"r": 12}], ids=str)
@pytest.mark.parametrize("matrix", [0, 1], ids=["A", "B"])
def test_gradients_are_the_slope_of_the_loss(
    matrix: int, options: dict[str, Any], engine: Engine, admit: Admit
) -> None:
    """Scale, rank and dropout's mask are the same in both directions; the engine's backward pass is its own code."""
    slot = admit("watched", lora_alpha=48.0, **options)  # an adapter that outweighs the base shows what it does wrong
    admit("neighbour", r=16, seed=5, lora_dropout=0.1)
    learned = engine.learn(engine.slots)["watched"][1]
    start, step, gradients = slot.vector.clone(), 1e-3, list(slot.weights(slot.vector.grad).values())
    for layer in (0, 1, 5, len(slot.pairs) - 1):  # of two groups, and a layer alone
        gradient = gradients[layer][matrix] * learned
        direction = gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            slot.vector.copy_(start)
            slot.pairs[layer][matrix].add_(direction, alpha=sign * step)
            ends.append(float(_loss(engine, slot)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_a_slot_that_does_not_step_is_untouched(engine: Engine, admit: Admit) -> None:
    steps, rests = admit("steps", weight_decay=0.5), admit("rests", weight_decay=0.5)
    engine.advance()
    before = [tensor.clone() for tensor in (rests.vector, *_moments(rests))]
    own = steps.vector.clone()
    steps.update(*engine.learn([steps])["steps"])
    assert not torch.equal(steps.vector, own)
    assert all(torch.equal(old, new) for old, new in zip(before, (rests.vector, *_moments(rests)), strict=True))


def _moments(slot: Slot) -> list[torch.Tensor]:
    state = slot.optimizer.state[slot.vector]
    return [state[name] for name in ("exp_avg", "exp_avg_sq", "step")]


def test_checkpointed_activations_come_from_the_same_slots(home: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        engine = _engine(home, gradient_checkpointing=checkpointing)
        slots = [_admit(engine, str(seed), r=4 * 2**seed, seed=seed, lora_dropout=0.2) for seed in range(3)]
        engine.learn(slots)
        gradients.append([slot.vector.grad.clone() for slot in slots])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_one_product_for_all_trials_is_the_same_but_for_rounding(home: Path) -> None:
    """As on a GPU."""
    gradients = []
    for at_once in (False, True):
        engine = _engine(home)
        for layer in engine.packed:
            layer.group.at_once = at_once
        slots = [_admit(engine, str(seed), r=4 * 2**seed, seed=seed) for seed in range(3)]
        engine.learn(slots)
        gradients.append([slot.vector.grad.clone() for slot in slots])
    for apart, together in zip(*gradients, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-5)


def test_training_and_evaluation_take_one_numerical_path(engine: Engine, admit: Admit) -> None:
    slot = admit("watched")
    engine.eval = [engine.train[i] for i in slot.micro_batches()[0]]
    loss, _ = engine.learn([slot])["watched"]
    assert engine.evaluate([slot])["watched"] == pytest.approx(loss, rel=1e-7)
