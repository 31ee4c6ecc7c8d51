"""What one pass over many trials computes: for each of them what stock transformers and calculus say."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainables import base
from trainables.adapters import Stack
from trainables.contract import TrialConfig
from trainables.data.snapshot import Snapshot
from trainables.engine import Engine
from trainables.packing import Example, pack
from trainables.slots import Slot
from trainables.spec import BaseModelSpec, TrainingSpec

Admit = Callable[..., Slot]


@pytest.fixture
def make(tiny: BaseModelSpec, tickets: Snapshot) -> Callable[..., Engine]:
    return lambda **options: Engine(tiny, tickets, **options)


@pytest.fixture
def engine(make) -> Engine:
    return make()


@pytest.fixture
def admit(engine: Engine) -> Admit:
    return lambda name, **training: _admit(engine, name, **training)


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
    engine: Engine, admit: Admit
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
    assert [len(next_ids) for next_ids in packed.next_ids] == [4 + 2, 1 + 6 + 3]
    for next_ids, own in zip(packed.next_ids, rows.values(), strict=True):
        assert torch.equal(next_ids, torch.cat([row.input_ids[1:] for row in own]))
    following = packed.input_ids[packed.predicting + 1]
    assert torch.equal(following, torch.cat(packed.next_ids))


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
    options = options | {"lora_alpha": 48.0, "max_grad_norm": 1e9}
    slot = admit("watched", **options)  # an adapter that outweighs the base shows what it does wrong
    admit("neighbour", r=16, seed=5, lora_dropout=0.1)
    learned = engine.learn(engine.slots)["watched"].tokens
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


def test_dropout_makes_up_for_what_it_leaves_out(engine: Engine, admit: Admit) -> None:
    """On average an adapter adds what it adds without."""
    slot, group = admit("watched", lora_dropout=0.3), engine.packed[0].group
    x = torch.randn(40, engine.packed[0].layer.in_features, generator=torch.Generator().manual_seed(1))

    def added(micro_batch: int | None) -> torch.Tensor:
        outputs = [x.new_zeros(len(x), layer.layer.out_features) for layer in group.layers]
        slot.adapter(micro_batch).alone(len(x)).adapt(group, x, outputs)
        return torch.cat(outputs, 1)

    whole, masked = added(None), torch.stack([added(k) for k in range(300)])
    assert float((masked[0] - whole).norm() / whole.norm()) > 0.3
    assert float((masked.mean(0) - whole).norm() / whole.norm()) < 0.1


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


@pytest.mark.parametrize("at_once", [False, True], ids=["apart", "at-once"])
def test_checkpointed_activations_come_from_the_same_slots(at_once: bool, make) -> None:
    gradients = []
    for checkpointing in (False, True):
        engine = make(gradient_checkpointing=checkpointing)
        engine.at_once = at_once
        slots = [_admit(engine, str(seed), r=4 * 2 ** (seed // 2), seed=seed, lora_dropout=0.2) for seed in range(4)]
        engine.learn(slots)
        gradients.append([slot.vector.grad.clone() for slot in slots])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


MIXED = (
    {"r": 8, "per_device_train_batch_size": 4},
    {"r": 16, "per_device_train_batch_size": 3, "lora_alpha": 16.0},
    {"r": 8, "per_device_train_batch_size": 5, "lora_alpha": 64.0},
    {"r": 16, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    {"r": 12, "per_device_train_batch_size": 4},
    {"r": 8, "per_device_train_batch_size": 24},
)
"""Two ranks that can be stacked and one alone; of those of rank 8 one has too many tokens to go with the others."""


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"target_modules": "attention-qv"}], ids=["plain", "dropout", "modules"]
)
def test_all_trials_at_once_is_the_same_but_for_rounding(options: dict[str, Any], make) -> None:
    """As on a GPU; in training and in evaluation, and every trial has what is its own."""
    gradients, losses, evals = [], [], []
    for at_once in (False, True):
        engine = make(**{name: value for name, value in options.items() if name == "target_modules"})
        engine.at_once = at_once
        slots = [_admit(engine, str(seed), seed=seed, **kind | options) for seed, kind in enumerate(MIXED)]
        losses.append([learned.loss for learned in engine.learn(slots).values()])
        evals.append([*engine.evaluate(slots).values()])
        gradients.append([slot.vector.grad.clone() for slot in slots])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert evals[1] == pytest.approx(evals[0], rel=1e-5)
    for apart, together in zip(*gradients, strict=True):
        assert float((apart - together).norm() / apart.norm()) < 1e-5


def test_neighbours_of_one_rank_and_about_one_length_share_their_calls(engine: Engine, admit: Admit) -> None:
    slots = [admit(str(seed), seed=seed, **kind) for seed, kind in enumerate(MIXED)]
    rows = [(k, slot.adapter(0), [engine.train[i] for i in slot.micro_batches()[0]]) for k, slot in enumerate(slots)]
    engine.at_once = True
    order, packed = engine._pack(rows)
    assert [slots[k].training.r for k in order] == [8, 8, 8, 12, 16, 16]
    assert [len(one.adapters) if isinstance(one, Stack) else 1 for one in packed.adapters] == [2, 1, 1, 2]
    assert sum(packed.tokens) == len(packed.input_ids)
    assert sum(rows for rows, _ in packed.rectangles) == 4 + 3 + 5 + 3 + 4 + 24
    assert len(packed.rectangles) < len(MIXED)
    assert order[2] == len(MIXED) - 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_calls_at_once_do_not_grow_with_trials(dropout: float, make) -> None:
    """But for what is done once for each: its loss, and its way into the pass and out of it."""
    counts: dict[tuple[bool, int], int] = {}
    for at_once in (False, True):
        for trials in (2, 6):
            engine = make()
            engine.at_once = at_once
            slots = [_admit(engine, str(seed), seed=seed, lora_dropout=dropout) for seed in range(trials)]
            with _Calls() as calls:
                engine.learn(slots)
            counts[at_once, trials] = calls.count
    more = {at_once: (counts[at_once, 6] - counts[at_once, 2]) / 4 for at_once in (False, True)}
    layers = len(engine.packed)
    assert more[True] < 40 < 5 * layers < more[False], "none in a layer, or more than five"


def test_a_stacks_scale_is_the_trials_own_in_16_bits_too(engine: Engine) -> None:
    """16 / 12 is 0.2 % more in bfloat16; what rounding alone does has no direction."""
    slots = []
    for seed in range(2):
        training = TrainingSpec(r=12, lora_alpha=16.0, seed=seed)
        config = TrialConfig(str(seed), engine.spec, training, "", 4)
        slots.append(Slot(config, engine.layers, engine.lengths, engine.device, torch.bfloat16))
        slots[-1].vector.copy_(torch.randn(slots[-1].vector.shape, generator=torch.Generator().manual_seed(seed)))
    adapters = [slot.adapter(None) for slot in slots]
    group = engine.packed[-1].group
    x = torch.randn(2, 64, engine.packed[-1].layer.in_features, generator=torch.Generator().manual_seed(5)).bfloat16()
    apart = x.new_zeros(2, 64, engine.packed[-1].layer.out_features)
    for adapter, own, y in zip(adapters, x, apart, strict=True):
        adapter.adapt(group, own, [y])
    together = torch.zeros_like(apart).flatten(0, 1)
    Stack(adapters, [64, 64]).adapt(group, x.flatten(0, 1), [together])
    apart, together = apart.flatten().double(), together.flatten().double()
    assert float(apart @ together / (apart @ apart)) == pytest.approx(1, abs=5e-4)


def test_a_pass_that_broke_off_leaves_no_memory_taken(engine: Engine, admit: Admit, monkeypatch) -> None:
    """Not even while the next one begins. It breaks between two layers of a group, one of which computed for both."""
    for name in ("a", "b"):
        admit(name)
    block = engine.model.get_decoder().layers[1].mlp
    kept: list[weakref.ref[torch.Tensor]] = []
    activate, losses = block.act_fn.forward, engine._losses

    def breaks(gate: torch.Tensor) -> torch.Tensor:
        if kept:
            return activate(gate)
        kept.append(weakref.ref(block.up_proj.group._outputs[1]))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def begins(packed: Any) -> list[torch.Tensor]:
        assert not kept or kept[0]() is None
        return losses(packed)

    monkeypatch.setattr(block.act_fn, "forward", breaks)
    monkeypatch.setattr(engine, "_losses", begins)
    assert engine.advance() == []
    assert engine.together == 1
    assert engine.current.pack is None


def test_a_step_waits_for_numbers_once(engine: Engine, admit: Admit, monkeypatch) -> None:
    """Until it is asked for more a GPU would have nothing to do: not for each trial, and not for each batch."""
    lists, told = list[torch.Tensor](), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or told(tensor))
    for name in ("a", "b", "c"):
        admit(name, gradient_accumulation_steps=2)
    with _Calls() as calls:
        assert engine.advance() == []
    assert calls.asked == 0
    assert [len(numbers) for numbers in lists] == [3 * 2 + 3], "a share of the loss for each batch, and norms"


class _Calls(TorchDispatchMode):
    """Counts what torch is asked to compute, where views are no work, and the single numbers that it is asked for,
    where those of labels, which lie on the CPU, are none."""

    count = asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        self.asked += func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is not torch.int64
        return func(*args, **kwargs or {})


def test_a_stacked_neighbour_that_is_no_number_reaches_nobody(engine: Engine, admit: Admit) -> None:
    engine.at_once = True
    slots = [admit(str(seed), seed=seed) for seed in range(3)]
    expected = engine.learn(slots)
    gradients = [slot.vector.grad.clone() for slot in slots]
    with torch.no_grad():
        slots[1].vector.fill_(torch.nan)
    found = engine.learn(slots)
    assert not torch.isfinite(slots[1].vector.grad).any()
    for k in (0, 2):
        assert found[str(k)] == expected[str(k)]
        assert torch.equal(slots[k].vector.grad, gradients[k])


def test_training_and_evaluation_take_one_numerical_path(engine: Engine, admit: Admit) -> None:
    slot = admit("watched")
    engine.eval = [engine.train[i] for i in slot.micro_batches()[0]]
    loss = engine.learn([slot])["watched"].loss
    assert engine.evaluate([slot])["watched"] == pytest.approx(loss, rel=1e-7)
