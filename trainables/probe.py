"""What a trial costs an engine, measured on its own device before it takes any: seconds and bytes a token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from cluster import session
from trainables.adapters import stacked_bytes
from trainables.capacity import MemoryModel
from trainables.contract import TrialConfig
from trainables.data.snapshot import Snapshot
from trainables.engine import Counters, Engine
from trainables.order import epoch_order
from trainables.packing import Example, HeadLoss
from trainables.slots import Slot
from trainables.spec import BaseModelSpec, TrainingSpec

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else tells when it starts and stops

_SHARE = 0.9
"""Of a device's memory that an engine plans with; the rest is the allocator's and the process's own."""

_LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 3, 50, 2.0
"""Of a trial alone, to know what it costs; one step varies by a third, mostly with its tokens."""

_EPOCHS = 3
"""Whose batches are looked at for the largest one; an epoch's order is the trial's own, so more find little more."""


def device_memory(device: torch.device, cpus: float) -> float:
    """Bytes for an engine: of a GPU, or of the machine's memory the part that goes with the engine's cores."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(_SHARE * total, free + torch.cuda.memory_reserved(device))  # others may be on it
    return _SHARE * session.memory_of_cores(cpus)


def alone(engine: Engine, training: TrainingSpec) -> tuple[int, float]:
    """Tokens and seconds of some training passes with one trial in them."""
    with _untouched(engine):
        slot, counters = _slot(engine, training), engine.counters
        _step(engine, slot)  # allocates what later ones reuse
        tokens, seconds = counters.alone_tokens, counters.alone_s
        for step in range(_MOST_STEPS):
            if step >= _LEAST_STEPS and counters.alone_s - seconds > _ENOUGH_S:
                break
            _step(engine, slot)
        return counters.alone_tokens - tokens, counters.alone_s - seconds


def memory(engine: Engine, largest: TrainingSpec) -> MemoryModel:
    """The engine's memory model, its bytes a token fitted through passes over one example and over half of it.

    Args:
        largest: the definition's training section with the most that the search can make of it.

    Raises:
        torch.OutOfMemoryError: not even one example of one trial fits.
        CannotPack: the longest example is wider than the base's attention looks.
    """
    longest = max(len(example.input_ids) for example in [*engine.train, *engine.eval])
    sizes = (max(2, longest // 2), max(4, longest))
    batch_tokens, eval_batch_tokens = _largest_batch(engine.lengths, largest), _largest_eval_batch(engine, largest)
    with _untouched(engine):
        slot = _slot(engine, largest)
        _step(engine, slot)  # makes the moments
        train = [_peak(engine, slot, size, learned=1) for size in sizes]
        judged = [_peak(engine, slot, size, learned=1, evaluate=True) for size in sizes]
        head = (_peak(engine, slot, sizes[1], learned=sizes[1] - 1) - train[1]) / (sizes[1] - 2)
        token, eval_token = ((large - small) / (sizes[1] - sizes[0]) for small, large in (train, judged))
        fixed = max(0.0, train[0] - token * sizes[0])
        slot_bytes, spread = _slot_bytes(slot), 0.0
        if engine.at_once:  # which a trial alone, as here, does not show
            slot_bytes += slot.computing.nbytes + slot.vector.nbytes  # the stack's copy of weights, and of gradients
            spread = _spread(engine, largest)
    chunk = min(HeadLoss.CHUNK, max(batch_tokens, eval_batch_tokens))
    return MemoryModel(
        base=_base_bytes(engine),
        scratch=round(fixed + max(0.0, head) * chunk),
        slot=slot_bytes,
        token=max(0.0, token) + spread,
        eval_token=max(0.0, eval_token) + spread,
        batch_tokens=batch_tokens,
        eval_batch_tokens=eval_batch_tokens,
        dequantised=_dequantised_bytes(engine),
    )


def measured(
    spec: BaseModelSpec, data: Snapshot, largest: TrainingSpec, memory_gib: float | None, cpus: float, answers: bool
) -> tuple[MemoryModel, float]:
    """An engine's memory model and the bytes that it may use, from an engine made for that alone on this machine.

    Args:
        memory_gib: that the definition allows; None for what the device has.
        answers: whether the engine is to answer with its adapters, too.

    Raises:
        CannotPack: the base is none that engines can share.
    """
    engine = Engine(spec, data, largest.target_modules, 1, largest.gradient_checkpointing)
    limit = memory_gib * 2**30 if memory_gib else device_memory(engine.device, cpus)
    model = memory(engine, largest)
    return model, limit - (model.for_answers if answers else 0)


@contextmanager
def _untouched(engine: Engine) -> Iterator[None]:
    """Whatever a probe does, the engine counts and learns from what it had before."""
    assert not engine.slots, "a probe needs the engine to itself"
    before = (engine.train, engine.eval, engine.lengths)
    try:
        yield
    finally:
        engine.train, engine.eval, engine.lengths = before
        engine.counters = Counters(base_loads=engine.counters.base_loads)
        engine.keep_dequantised(engine.keeps_dequantised)
        for layer in engine.packed:
            layer.dequantisations = 0


def _slot(engine: Engine, training: TrainingSpec) -> Slot:
    config = TrialConfig("probe", engine.spec, training, "", 1)
    return Slot(config, engine.layers, engine.lengths, engine.device, engine.dtype)


def _step(engine: Engine, slot: Slot) -> None:
    slot.update(*engine.learn([slot])[slot.trial_id])


def _peak(engine: Engine, slot: Slot, tokens: int, learned: int, evaluate: bool = False) -> int:
    """Most bytes at once, above what stood before, in one pass over one made-up example."""
    labels = torch.full((tokens,), -100)
    labels[-learned:] = 0
    row = Example(torch.zeros(tokens, dtype=torch.long), labels)
    engine.train, engine.eval, engine.lengths = [row], [row], [tokens]
    slot = _slot(engine, slot.training)
    engine.current.pack = None  # the last pass's, which would be freed in this one
    work: Callable[[], object] = (lambda: engine.evaluate([slot])) if evaluate else (lambda: engine.learn([slot]))
    return _peak_cuda(work) if engine.device.type == "cuda" else _peak_cpu(work)


def _peak_cuda(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(work: Callable[[], object]) -> int:
    """From torch's own record of allocations: a CPU has no counter to ask."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    kineto = recorded.profiler.kineto_results
    assert kineto is not None
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _slot_bytes(slot: Slot) -> int:
    """Weights, gradient, best weights, weights as passes take them, and whatever its optimizer keeps."""
    state = [value for value in slot.optimizer.state[slot.vector].values() if isinstance(value, torch.Tensor)]
    assert slot.vector.grad is not None
    kept = {id(tensor): tensor for tensor in (slot.vector, slot.vector.grad, slot.best, slot.computing, *state)}
    return sum(tensor.nbytes for tensor in kept.values())


def _spread(engine: Engine, largest: TrainingSpec) -> float:
    """Bytes a token that padding adds where trials go together; recomputed activations are kept for no longer."""
    sizes = engine.model.config.get_text_config()
    product, kept = stacked_bytes(
        engine.layers, largest.r, sizes.hidden_size, sizes.num_hidden_layers, engine.dtype.itemsize
    )
    return product + (0.0 if largest.gradient_checkpointing else kept)


def _base_bytes(engine: Engine) -> int:
    """Parameters once each (a head may be the embedding), with what bitsandbytes needs to dequantise them."""
    parameters = sum(parameter.nbytes for parameter in engine.model.parameters())
    states = [state for layer in engine.packed if (state := getattr(layer.layer.weight, "quant_state", None))]
    return parameters + sum(tensor.nbytes for state in states for tensor in state.as_dict(packed=True).values())


def _dequantised_bytes(engine: Engine) -> int:
    layers = [layer.layer for layer in engine.packed if hasattr(layer.layer.weight, "quant_state")]
    return sum(layer.in_features * layer.out_features for layer in layers) * engine.dtype.itemsize


def _largest_batch(lengths: Sequence[int], training: TrainingSpec) -> int:
    size = training.per_device_train_batch_size
    orders = [
        epoch_order(lengths, training.effective_batch, training.train_sampling_strategy, training.seed, epoch)
        for epoch in range(_EPOCHS)
    ]
    return max(
        sum(lengths[example] for example in order[start : start + size])
        for order in orders
        for start in range(0, len(order), size)
    )


def _largest_eval_batch(engine: Engine, training: TrainingSpec) -> int:
    size, lengths = training.per_device_eval_batch_size, [len(example.input_ids) for example in engine.eval]
    return max(sum(lengths[start : start + size]) for start in range(0, len(lengths), size))
