"""How many trials a device holds: the formula, and the probe that it takes its bytes from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trainables import probe
from trainables.capacity import MemoryModel
from trainables.data.snapshot import Snapshot
from trainables.engine import Engine
from trainables.spec import BaseModelSpec, TrainingSpec

MODEL = MemoryModel(
    base=1000,
    scratch=100,
    slot=20,
    token=2.0,
    eval_token=1.0,
    batch_tokens=40,
    eval_batch_tokens=50,
    dequantised=500,
)


def test_each_slot_adds_its_state_and_its_largest_pass() -> None:
    assert MODEL.needed(0) == 1100
    assert MODEL.needed(3) - MODEL.needed(2) == 20 + 2 * 40


def test_a_large_evaluation_batch_can_bind_first() -> None:
    wide = MemoryModel(**MODEL.as_dict() | {"eval_batch_tokens": 200})
    assert wide.activations == 200


@pytest.mark.parametrize(("limit", "slots"), [(1100, 0), (1199, 0), (1200, 1), (1299, 1), (1900, 8)])
def test_slots_are_those_that_fit_whole(limit: int, slots: int) -> None:
    assert MODEL.slots(limit) == slots
    assert slots == 0 or MODEL.needed(slots) <= limit < MODEL.needed(slots + 1)


@pytest.fixture
def probed(tiny: BaseModelSpec, tickets: Snapshot) -> Callable[..., MemoryModel]:
    def probe_with(**training: object) -> MemoryModel:
        wanted = TrainingSpec.model_validate({"r": 8, "per_device_train_batch_size": 8} | training)
        return probe.memory(Engine(tiny, tickets, gradient_checkpointing=wanted.gradient_checkpointing), wanted)

    return probe_with


def test_a_probe_finds_what_a_trial_adds(probed) -> None:
    small, large = probed(), probed(r=16, per_device_train_batch_size=16)
    assert large.base == small.base
    assert large.slot == pytest.approx(2 * small.slot, rel=0.01)  # a scalar or two beside the vectors
    assert large.batch_tokens > 1.5 * small.batch_tokens
    assert large.token >= small.token > small.eval_token > 0


def test_checkpointing_keeps_less_of_each_token(probed) -> None:
    assert probed(gradient_checkpointing=True).token < 0.6 * probed().token


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [False, True], ids=["apart", "at-once"])
def test_the_model_bounds_what_a_pass_really_takes(at_once: bool, dropout: float, tiny, tickets) -> None:
    """Against torch's own record of a step of four trials with their real batches."""
    training = TrainingSpec(r=8, per_device_train_batch_size=8, lora_dropout=dropout)
    engine = Engine(tiny, tickets, capacity=4)
    engine.at_once = at_once
    model = probe.memory(engine, training)
    kinds = enumerate((8, 6, 8, 7))
    slots = [
        probe._slot(engine, training.model_copy(update={"seed": seed, "per_device_train_batch_size": size}))
        for seed, size in kinds
    ]
    most = probe._peak_cpu(lambda: engine.learn(slots))
    predicted = model.needed(4) - model.base - 4 * probe._slot_bytes(slots[0])
    assert 0.5 * predicted < most <= predicted
    assert torch.isfinite(slots[0].vector.grad).all()
