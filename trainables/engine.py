"""The shared-base engine: one frozen base, many trials in slots, one forward and backward pass for all of them.

It knows no Ray. ``admit`` trials up to ``capacity``, call ``advance`` until ``slots`` is empty; a slot may be evicted
and another trial admitted between any two calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training

from trainables import base, lora
from trainables.contract import Reason, Report, TrialConfig
from trainables.packing import ATTENTION, Example, HeadLoss, Pack, PackedLinear, pack
from trainables.slots import Slot, examples_of
from trainables.snapshot import Snapshot
from trainables.spec import BaseModelSpec


@dataclass(frozen=True)
class Evaluated:
    """A trial's evaluation; the slot's state is what ``checkpoint`` writes until the next ``advance``."""

    slot: Slot
    report: Report


@dataclass(frozen=True)
class Failed:
    """A trial that cannot go on; its slot is free already."""

    slot: Slot
    reason: Reason
    message: str


@dataclass
class Stay:
    """A trial's time in a slot, in seconds since the engine had its base."""

    slot: int
    trial_id: str
    admitted_s: float
    left_s: float | None = None
    ending: str = "running"
    """ended, evicted or failed."""
    steps: int = 0


@dataclass
class Counters:
    """Counted work, for benchmarks and for the run's own account."""

    base_loads: int = 0
    passes: int = 0
    adapter_steps: int = 0
    trained_tokens: int = 0
    dequantisations: int = 0
    slot_steps: int = 0
    idle_slot_steps: int = 0
    steps_past_stop: int = 0
    splits: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Engine:
    """A base on this process's device, with slots.

    Args:
        data: its train split is what trials learn, its eval split what they are judged by.
        target_modules: the preset that every trial of this engine has.
        capacity: slots at most.
    """

    def __init__(
        self,
        spec: BaseModelSpec,
        data: Snapshot,
        target_modules: str = "all-linear",
        capacity: int = 8,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.spec, self.capacity, self.together = spec, capacity, capacity
        self.counters, self.slots, self.stays = Counters(), list[Slot](), list[Stay]()
        self.device, self.dtype = base.device(), base.compute_dtype(spec)
        self.train, self.eval = examples_of(data.rows("train")), examples_of(data.rows("eval"))
        self.lengths = [len(example.input_ids) for example in self.train]
        self.model = self._load(gradient_checkpointing)
        self.layers, self.target_modules = lora.targets(self.model, target_modules), target_modules
        places = {layer.name: place for place, layer in enumerate(self.layers)}
        every = lora.targets(self.model, "all-linear")
        self.packed = [self._replace(layer.name, places.get(layer.name)) for layer in every]
        self.started = time.monotonic()

    def admit(self, config: TrialConfig, resume_from: Path | None = None) -> Slot:
        """Give a trial a slot of its own, from its start or from a checkpoint.

        Raises:
            ValueError: the trial wants another base or other layers than this engine has.
        """
        if config.base_model != self.spec or config.training.target_modules != self.target_modules:
            raise ValueError(f"{config.trial_id}: needs another base or other target_modules than this engine's")
        assert len(self.slots) < self.capacity, "admit: no free slot"
        slot = Slot(config, self.layers, self.lengths, self.device)
        if resume_from is not None:
            slot.restore(resume_from)
        self.slots.append(slot)
        self._stay(slot)
        return slot

    def evict(self, trial_id: str) -> None:
        """Free a trial's slot, whatever it was doing."""
        for slot in [slot for slot in self.slots if slot.trial_id == trial_id]:
            self.counters.steps_past_stop += len(slot.progress.losses)
            self._leave(slot, "evicted")

    def advance(self) -> list[Evaluated | Failed]:
        """One optimizer step of every trial, then the evaluations that are due; ended trials leave their slots."""
        self.counters.slot_steps += self.capacity
        self.counters.idle_slot_steps += self.capacity - len(self.slots)
        failed = [*self._together(self.slots, self._step)]
        alive = [slot for slot in self.slots if slot not in {failure.slot for failure in failed}]
        due = [slot for slot in alive if slot.due]
        found: dict[str, float] = {}
        failed += self._together(due, lambda group: found.update(self.evaluate(group)) or [])
        events: list[Evaluated] = []
        for slot in due:
            if slot.trial_id not in found:
                continue
            if not torch.isfinite(torch.tensor(found[slot.trial_id])):
                failed.append(_not_finite(slot, "eval loss"))
            else:
                events.append(Evaluated(slot, slot.evaluated(found[slot.trial_id], len(self.train))))
        for failure in failed:
            self._leave(failure.slot, "failed")
        for event in events:
            if event.slot.ended:
                self._leave(event.slot, "ended")
        return [*events, *failed]

    def evaluate(self, slots: Sequence[Slot]) -> dict[str, float]:
        """Mean negative log likelihood, in nats, of the eval split's learned tokens, by trial."""
        totals = {slot.trial_id: (0.0, 0) for slot in slots}
        started = time.monotonic()
        self.model.eval()
        with torch.no_grad():
            for batches in _rounds([self._eval_batches(slot) for slot in slots]):
                packed = pack([(slots[k].adapter(None), rows) for k, rows in batches], self.device)
                for (k, _), loss, part in zip(batches, self._losses(packed), packed.parts, strict=True):
                    total, tokens = totals[slots[k].trial_id]
                    totals[slots[k].trial_id] = (total + float(loss), tokens + len(part.next_ids))
        _charge(slots, started)
        return {trial_id: total / tokens for trial_id, (total, tokens) in totals.items()}

    def _stay(self, slot: Slot) -> None:
        taken = {stay.slot for stay in self.stays if stay.left_s is None}
        place = next(place for place in range(self.capacity) if place not in taken)
        self.stays.append(Stay(place, slot.trial_id, time.monotonic() - self.started))

    def _leave(self, slot: Slot, ending: str) -> None:
        self.slots.remove(slot)
        stay = next(stay for stay in self.stays if stay.trial_id == slot.trial_id and stay.left_s is None)
        stay.left_s, stay.ending = time.monotonic() - self.started, ending
        stay.steps = slot.progress.step

    def _step(self, slots: Sequence[Slot]) -> list[Failed]:
        started = time.monotonic()
        self.model.train()
        plans = [[[self.train[i] for i in batch] for batch in slot.micro_batches()] for slot in slots]
        tokens = [sum(_learned(batch) for batch in plan) for plan in plans]
        sums = [0.0] * len(slots)
        for slot in slots:
            slot.clear()
        for place, batches in enumerate(_rounds(plans)):
            packed = pack([(slots[k].adapter(place), rows) for k, rows in batches], self.device)
            shares = [loss / tokens[k] for (k, _), loss in zip(batches, self._losses(packed), strict=True)]
            torch.stack(shares).sum().backward()
            for (k, _), share in zip(batches, shares, strict=True):
                sums[k] += float(share.detach())
        _charge(slots, started)
        failed = []
        for slot, loss, learned in zip(slots, sums, tokens, strict=True):
            if slot.update(loss, learned):
                self.counters.adapter_steps += 1
                self.counters.trained_tokens += learned
            else:
                failed.append(_not_finite(slot, "training loss or gradient"))
        self.counters.dequantisations = sum(layer.dequantisations for layer in self.packed)
        return failed

    def _losses(self, packed: Pack) -> list[torch.Tensor]:
        """Summed loss of each part."""
        self.counters.passes += 1
        for layer in self.packed:
            layer.pack = packed
        embedded = self.model.get_input_embeddings()(packed.input_ids[None])
        if torch.is_grad_enabled():
            embedded.requires_grad_()  # everything before the first adapter is frozen, so autograd needs a start
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            hidden = self.model.get_decoder()(
                inputs_embeds=embedded,
                attention_mask=None,
                position_ids=packed.positions[None],
                use_cache=False,
                pack=packed,
            ).last_hidden_state[0]
        weight = self.model.get_output_embeddings().weight
        shares = hidden.to(weight.dtype).split([part.end - part.start for part in packed.parts])
        return [
            HeadLoss.apply(share.index_select(0, part.predicting), weight, part.next_ids)
            for share, part in zip(shares, packed.parts, strict=True)
        ]

    def _together(self, slots: Sequence[Slot], work: Any) -> Iterator[Failed]:
        """Do ``work`` for groups of slots; out of memory halves the group, for good, and tries again.

        A batch is never cut, so a trial takes the same steps in a smaller group; one that does not fit alone fails.
        """
        waiting = list(slots)
        while waiting:
            group = waiting[: self.together]
            try:
                failures = work(group)
            except (torch.OutOfMemoryError, MemoryError) as error:
                message = str(error).split("\n")[0]
            else:
                yield from failures
                waiting = waiting[len(group) :]
                continue
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(group) == 1:
                yield Failed(group[0], "oom", message)
                waiting = waiting[1:]
            else:
                self.together = (len(group) + 1) // 2
                self.counters.splits += 1

    def _eval_batches(self, slot: Slot) -> list[list[Example]]:
        size = slot.training.per_device_eval_batch_size
        return [self.eval[start : start + size] for start in range(0, len(self.eval), size)]

    def _load(self, gradient_checkpointing: bool) -> Any:
        model: Any = base.load_model(self.spec)
        self.counters.base_loads += 1
        if self.spec.quantization == "nf4":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.requires_grad_(False)
        model.set_attn_implementation(ATTENTION)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _replace(self, name: str, place: int | None) -> PackedLinear:
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        packed = PackedLinear(getattr(owner, child), place)
        setattr(owner, child, packed)
        return packed


def _rounds(plans: Sequence[Sequence[Any]]) -> Iterator[list[tuple[int, Any]]]:
    """First batches of all, then second ones, ...; whose plan is shorter is absent from later rounds."""
    for place in range(max(map(len, plans), default=0)):
        yield [(k, plan[place]) for k, plan in enumerate(plans) if place < len(plan)]


def _learned(batch: Sequence[Example]) -> int:
    return sum(int((example.labels[1:] != -100).sum()) for example in batch)


def _charge(slots: Sequence[Slot], started: float) -> None:
    """A pass's time, shared equally: the same batch size makes about the same work."""
    for slot in slots:
        slot.progress.device_seconds += (time.monotonic() - started) / len(slots)


def _not_finite(slot: Slot, what: str) -> Failed:
    return Failed(slot, "nan", f"{what} is no finite number at step {slot.progress.step + 1}")
