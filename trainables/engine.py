"""The shared-base engine: one frozen base, many trials in slots, one forward and backward pass for all of them.

It knows no Ray. ``admit`` trials up to ``capacity``, call ``advance`` until ``slots`` is empty; a slot may be evicted
and another trial admitted between any two calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainables import base, lora
from trainables.adapters import Adapter, stacking_order
from trainables.contract import CannotPack, Peer, Reason, Report, TrialConfig
from trainables.data.snapshot import Snapshot
from trainables.packing import ATTENTION, Current, Example, Group, HeadLoss, Pack, PackedLinear, pack
from trainables.slots import Slot, examples_of
from trainables.spec import BaseModelSpec, TrainingSpec

_CHECKED = 64
"""Tokens of an example by which a base is checked."""

_ALIKE = {torch.float32: 0.001, torch.bfloat16: 0.03, torch.float16: 0.03}
"""How far, in parts, its loss may then lie from the model's own."""


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


class Learned(NamedTuple):
    """What a trial's next step is made of, besides the gradients that lie in its slot."""

    loss: float
    tokens: int
    """That the loss is a mean over."""
    norm: float
    """Of the gradients, before they were cut to ``max_grad_norm``."""


@dataclass
class Stay:
    """A trial's time in a slot, in seconds since the engine had its base."""

    slot: int
    trial_id: str
    admitted_s: float
    left_s: float | None = None
    ending: str = "running"
    """ended, evicted, moved or failed; lost with its engine."""
    steps: int = 0


@dataclass
class Counters:
    """Counted work, for benchmarks and for the run's own account."""

    base_loads: int = 0
    passes: int = 0
    adapter_steps: int = 0
    trained_tokens: int = 0
    tokens: int = 0
    """That training passes went over, learned or not."""
    training_s: float = 0.0
    """Of the device, in training passes, evaluation and optimizer steps apart."""
    alone_tokens: int = 0
    alone_s: float = 0.0
    """The same of passes with one trial in them, and of a probe before the first: what a token costs unpacked."""
    slot_steps: int = 0
    idle_slot_steps: int = 0
    """Of slots that a new trial came to later; what none is left to fill at the end of a sweep is no delay."""
    steps_past_stop: int = 0
    """Of evicted trials, since their last report: learned while that was judged, or before a pass was taken back."""
    splits: int = 0


class Engine:
    """A base on this process's device, with slots.

    Args:
        data: its train split is what trials learn, its eval split what they are judged by.
        target_modules: the preset that every trial of this engine has.
        capacity: slots at most.

    Raises:
        CannotPack: the base's own code computes something else than this engine would.
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
        self.idle = dict[int, int]()  # steps since a slot became free, by its place
        self.device, self.dtype = base.device(), base.compute_dtype(spec)
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # plans each shape anew, and hardly two passes have the same
        self.at_once = self.device.type == "cuda"  # launches cost more there than a trial's last bits matter
        self.train, self.eval = examples_of(data.rows("train")), examples_of(data.rows("eval"))
        self.lengths = [len(example.input_ids) for example in self.train]
        self.model = self._load(gradient_checkpointing)
        self.layers, self.target_modules = lora.targets(self.model, target_modules), target_modules
        self.current = Current()
        self.packed = self._replace_layers()
        self._check_model()
        self.keeps_dequantised = False
        self.started = time.monotonic()

    @property
    def dequantisations(self) -> int:
        """Of all layers so far."""
        return sum(layer.dequantisations for layer in self.packed)

    @property
    def age_s(self) -> float:
        """Since it had its base."""
        return time.monotonic() - self.started

    def keep_dequantised(self, keep: bool) -> None:
        """Whether 4-bit layers stay dequantised from pass to pass: the same bits without that work, for memory."""
        self.keeps_dequantised = keep
        for layer in self.packed:
            layer.keep(keep)

    def limit(self, slots: int) -> None:
        """Hold fewer trials than were wanted; at least one, which may then fail as ``oom`` itself."""
        self.capacity = self.together = max(1, min(self.capacity, slots))

    def admit(self, config: TrialConfig, resume_from: Path | None = None) -> Slot:
        """Give a trial a slot of its own, from its start or from a checkpoint.

        Raises:
            ValueError: the trial wants another base or other layers than this engine has.
        """
        if config.base_model != self.spec or config.training.target_modules != self.target_modules:
            raise ValueError(f"{config.trial_id}: needs another base or other target_modules than this engine's")
        assert len(self.slots) < self.capacity, "admit: no free slot"
        slot = Slot(config, self.layers, self.lengths, self.device, self.dtype)
        if resume_from is not None:
            slot.restore(resume_from)
        self.slots.append(slot)
        self._stay(slot, new=resume_from is None)
        return slot

    def evict(self, trial_id: str, ending: str = "evicted") -> None:
        """Free a trial's slot, whatever it was doing; what it learned since its last report is lost."""
        for slot in [slot for slot in self.slots if slot.trial_id == trial_id]:
            self.counters.steps_past_stop += len(slot.progress.losses)
            self._leave(slot, ending)

    def hand_over(self, slot: Slot, directory: Path) -> None:
        """Free the slot of a trial that goes on elsewhere from what this writes, to the same bits."""
        slot.save(directory)
        self._leave(slot, "moved")

    def advance(self) -> list[Evaluated | Failed]:
        """One optimizer step of every trial, then the evaluations that are due; ended trials leave their slots."""
        self.counters.slot_steps += self.capacity
        for place in self._free():
            self.idle[place] = self.idle.get(place, 0) + 1
        failed = self._step()
        due = [slot for slot in self.slots if slot.due and slot not in [failure.slot for failure in failed]]
        reports, unusable = self._judge(due)
        for failure in failed + unusable:
            self._leave(failure.slot, "failed")
        for event in reports:
            if event.slot.ended:
                self._leave(event.slot, "ended")
        return [*reports, *failed, *unusable]

    def _step(self) -> list[Failed]:
        """One optimizer step of every slot."""
        steps: dict[str, Learned] = {}
        failed = [*self._together(self.slots, lambda group: steps.update(self.learn(group)))]
        for slot in self.slots:
            if slot.trial_id in steps:
                failed += self._update(slot, steps[slot.trial_id])
        return failed

    def _judge(self, slots: Sequence[Slot]) -> tuple[list[Evaluated], list[Failed]]:
        """Evaluations, each with its peers, and the trials that have none to show."""
        found: dict[str, float] = {}
        failed = [*self._together(slots, lambda group: found.update(self.evaluate(group)))]
        reports = []
        for slot in slots:
            loss = found.get(slot.trial_id)
            if loss is None:
                continue  # it failed
            if math.isfinite(loss):
                reports.append(Evaluated(slot, slot.evaluated(loss, len(self.train))))
            else:
                failed.append(_not_finite(slot, "eval loss"))
        return _introduced(reports), failed

    def evaluate(self, slots: Sequence[Slot]) -> dict[str, float]:
        """Mean negative log likelihood, in nats, of the eval split's learned tokens, by trial."""
        started = self._clock()
        self._mode(training=False)
        whose, losses = list[tuple[int, int]](), list[torch.Tensor]()
        with torch.no_grad():
            for batches in _rounds([self._eval_batches(slot) for slot in slots]):
                order, packed = self._pack([(k, slots[k].adapter(None), rows) for k, rows in batches])
                losses += self._losses(packed)
                whose += zip(order, map(len, packed.next_ids), strict=True)
            numbers = torch.stack(losses).tolist()
        totals = {slot.trial_id: (0.0, 0) for slot in slots}
        for (k, learned), loss in zip(whose, numbers, strict=True):
            total, tokens = totals[slots[k].trial_id]
            totals[slots[k].trial_id] = (total + loss, tokens + learned)
        self.current.pack = None
        _charge(slots, [1] * len(slots), self._clock() - started)
        return {trial_id: total / tokens for trial_id, (total, tokens) in totals.items()}

    def _mode(self, training: bool) -> None:
        """The model's; asking first spares a walk over all of its modules at every step."""
        if self.model.training is not training:
            self.model.train(training)

    def _clock(self) -> float:
        """Seconds of this device's work: on a CPU this thread's own, which no other process on the core lengthens."""
        return time.thread_time() if self.device.type == "cpu" else time.monotonic()

    def _stay(self, slot: Slot, new: bool) -> None:
        place = self._free()[0]
        idle = self.idle.pop(place, 0)
        self.counters.idle_slot_steps += idle if new else 0
        self.stays.append(Stay(place, slot.trial_id, self.age_s))

    def _free(self) -> list[int]:
        taken = {stay.slot for stay in self.stays if stay.left_s is None}
        return [place for place in range(self.capacity) if place not in taken]

    def _leave(self, slot: Slot, ending: str) -> None:
        self.slots.remove(slot)
        stay = next(stay for stay in self.stays if stay.trial_id == slot.trial_id and stay.left_s is None)
        stay.left_s, stay.ending = self.age_s, ending
        stay.steps = slot.progress.step

    def learn(self, slots: Sequence[Slot]) -> dict[str, Learned]:
        """Gradients of each trial's next step. The device is waited for once, when all of its work is handed over."""
        started = self._clock()
        self._mode(training=True)
        plans = [[[self.train[i] for i in batch] for batch in slot.micro_batches()] for slot in slots]
        learned = [sum(_learned(batch) for batch in plan) for plan in plans]
        for slot in slots:
            slot.clear()
        whose, shares = list[int](), list[torch.Tensor]()
        for place, batches in enumerate(_rounds(plans)):
            order, found = self._gradients([(k, slots[k].adapter(place), rows) for k, rows in batches], learned)
            whose += order
            shares += found
        numbers = torch.stack([*shares, *(slot.clip() for slot in slots)]).tolist()
        losses, norms = [0.0] * len(slots), numbers[len(whose) :]
        for k, share in zip(whose, numbers[: len(whose)], strict=True):
            losses[k] += share
        tokens, seconds = [_tokens(plan) for plan in plans], self._clock() - started
        _charge(slots, tokens, seconds)
        self.counters.tokens += sum(tokens)
        self.counters.training_s += seconds
        if len(slots) == 1:
            self.counters.alone_tokens += sum(tokens)
            self.counters.alone_s += seconds
        return {slot.trial_id: Learned(losses[k], learned[k], norms[k]) for k, slot in enumerate(slots)}

    def _update(self, slot: Slot, learned: Learned) -> list[Failed]:
        """A trial's optimizer step. Apart from ``learn``, which may be tried again: no step is taken twice."""
        try:
            stepped = slot.update(*learned)
        except Exception as error:
            if self.device.type == "cuda" and not base.out_of_memory(error):
                torch.cuda.synchronize()  # raises where it is the device that has failed, and not this trial
            return [_failed(slot, error)]
        if not stepped:
            return [_not_finite(slot, "training loss or gradient")]
        self.counters.adapter_steps += 1
        self.counters.trained_tokens += learned.tokens
        return []

    def _gradients(
        self, batches: list[tuple[int, Adapter, list[Example]]], learned: Sequence[int]
    ) -> tuple[list[int], Sequence[torch.Tensor]]:
        """One forward and backward pass, of which nothing is left but gradients and each trial's share of its loss.

        Returns:
            of each share whose it is, and the shares, which the device may still be working on.
        """
        order, packed = self._pack(batches)
        losses = zip(order, self._losses(packed), strict=True)
        shares = torch.stack([loss / learned[k] for k, loss in losses])
        shares.sum().backward()
        packed.hand_out()
        self.current.pack = None
        return order, shares.detach().unbind()

    def _pack(self, batches: list[tuple[int, Adapter, list[Example]]]) -> tuple[list[int], Pack]:
        """A pass over a batch of each of some slots, and in which order they lie in it."""
        if self.at_once:
            batches = sorted(batches, key=lambda batch: stacking_order(batch[1], _tokens([batch[2]])))
        order = [k for k, _, _ in batches]
        return order, pack([(adapter, rows) for _, adapter, rows in batches], self.device, self.at_once)

    def _losses(self, packed: Pack) -> list[torch.Tensor]:
        """Summed loss of each trial."""
        self.counters.passes += 1
        self.current.pack = packed
        embedded = self.model.get_input_embeddings()(packed.input_ids[None])
        hidden = self.model.get_decoder()(
            inputs_embeds=embedded,
            attention_mask=None,
            position_ids=packed.positions[None],
            use_cache=False,
            pack=packed,
        ).last_hidden_state[0]
        weight = self.model.get_output_embeddings().weight
        shares = hidden.index_select(0, packed.predicting).split([len(next_ids) for next_ids in packed.next_ids])
        return [HeadLoss.apply(own, weight, next_ids) for own, next_ids in zip(shares, packed.next_ids, strict=True)]

    def _together(self, slots: Sequence[Slot], work: Any) -> Iterator[Failed]:
        """Do ``work`` for groups of slots; out of memory halves the group, for good, and tries again.

        What is kept for speed alone goes first.
        A batch is never cut, so a trial takes the same steps in a smaller group; one that does not fit alone fails.
        After any other error each trial is tried by itself.
        """
        waiting = list(slots)
        while waiting:
            group = waiting[: self.together]
            error = _error_of(work, group)
            if error:
                self._forget()
            if error is None or not base.out_of_memory(error):
                yield from self._apart(group, work) if error else ()
                waiting = waiting[len(group) :]
                continue
            if self.keeps_dequantised:
                self.keep_dequantised(False)
            elif len(group) == 1:
                yield _failed(group[0], error)
                waiting = waiting[1:]
            else:
                self.together = (len(group) + 1) // 2
                self.counters.splits += 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _apart(self, group: Sequence[Slot], work: Any) -> list[Failed]:
        """Each trial by itself, after an error that was none of memory: one that has it again has failed.

        Raises:
            Exception: all of them have, so it is the engine that does not work.
        """
        failed = []
        for slot in group:
            if error := _error_of(work, [slot]):
                failed.append(_failed(slot, error))
                self._forget()
        if len(failed) < len(group):
            return failed
        work(group)
        return []

    def _forget(self) -> None:
        """All that a pass has left that broke off: the next one needs its memory."""
        self.current.pack = None
        for layer in self.packed:
            layer.group.forget()

    def _eval_batches(self, slot: Slot) -> list[list[Example]]:
        size = slot.training.per_device_eval_batch_size
        return [self.eval[start : start + size] for start in range(0, len(self.eval), size)]

    def _load(self, gradient_checkpointing: bool) -> Any:
        model: Any = base.load_model(self.spec)
        self.counters.base_loads += 1
        model.requires_grad_(False)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _check_model(self) -> None:
        """Two examples in one pass have to come to what each does by the model's own code, head and attention included:
        what a model adds there (a cap, a factor, a window) would be left out without a word.

        From here on the model's attention is this engine's.
        """
        shortest = sorted(self.train, key=lambda example: len(example.input_ids))[:2]
        rows = [Example(ids, ids) for ids in (example.input_ids[:_CHECKED] for example in shortest)]
        config = TrialConfig("check", self.spec, TrainingSpec(), "", 1)
        adapter = Slot(config, self.layers, self.lengths, self.device, self.dtype).adapter(None)
        with torch.no_grad():
            own = [self._own_loss(row, adapter) for row in rows]
            self.model.set_attn_implementation(ATTENTION)
            try:
                order, packed = self._pack([(k, adapter, [row]) for k, row in enumerate(rows)])
                found = torch.stack(self._losses(packed)).tolist()
            except Exception as error:
                if base.out_of_memory(error) or isinstance(error, CannotPack):
                    raise
                raise CannotPack(f"{self._kind} does not take packed examples: {error}") from error
        for k, loss in zip(order, found, strict=True):
            tokens = len(rows[k].labels) - 1
            if not abs(loss - own[k]) <= _ALIKE[self.dtype] * max(own[k], 0.1 * tokens):
                raise CannotPack(
                    f"{self._kind} adds something to its attention or its head: {tokens} tokens have a loss of "
                    f"{own[k]:.4f} by its own code, and {loss:.4f} packed"
                )
        self.current.pack, self.counters.passes = None, 0
        for layer in self.packed:
            layer.dequantisations = 0

    @property
    def _kind(self) -> str:
        return f"the base (model_type {self.model.config.model_type})"

    def _own_loss(self, row: Example, adapter: Adapter) -> float:
        """Summed over all tokens of one example, by the model's own code around the packed layers."""
        self.current.pack = pack([(adapter, [row])], self.device)
        ids = row.input_ids.to(self.device)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"))

    def _replace_layers(self) -> list[PackedLinear]:
        """Put a packed layer in the place of every linear one, the head apart, whether adapters add to it or not."""
        groups = {group[0].group: place for place, group in enumerate(lora.groups(self.layers))}
        places = {layer.name: place for place, layer in enumerate(self.layers)}
        packed = []
        for members in lora.groups(lora.targets(self.model, "all-linear")):
            adapted = [(k, places[layer.name]) for k, layer in enumerate(members) if layer.name in places]
            group = Group(self.current, groups.get(members[0].group), adapted)
            packed += [self._replace(layer.name, group) for layer in members]
        return packed

    def _replace(self, name: str, group: Group) -> PackedLinear:
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        packed = PackedLinear(getattr(owner, child), group)
        setattr(owner, child, packed)
        return packed


def _rounds(plans: Sequence[Sequence[Any]]) -> Iterator[list[tuple[int, Any]]]:
    """First batches of all, then second ones, ...; whose plan is shorter is absent from later rounds."""
    for place in range(max(map(len, plans), default=0)):
        yield [(k, plan[place]) for k, plan in enumerate(plans) if place < len(plan)]


def _learned(batch: Sequence[Example]) -> int:
    return sum(int((example.labels[1:] != -100).sum()) for example in batch)


def _tokens(plan: Sequence[Sequence[Example]]) -> int:
    return sum(len(example.input_ids) for batch in plan for example in batch)


def _charge(slots: Sequence[Slot], weights: Sequence[int], seconds: float) -> None:
    """A pass's time to the trials in it, by weight."""
    for slot, weight in zip(slots, weights, strict=True):
        slot.progress.device_seconds += seconds * weight / sum(weights)


def _introduced(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """Evaluations of one pass, each with all others as its peers."""
    peers = [Peer(event.slot.trial_id, event.report.step, event.report.eval_loss) for event in evaluated]
    others = [tuple(peers[:place] + peers[place + 1 :]) for place in range(len(peers))]
    return [
        replace(event, report=replace(event.report, peers=beside))
        for event, beside in zip(evaluated, others, strict=True)
    ]


def _error_of(work: Any, group: Sequence[Slot]) -> Exception | None:
    """What ``work`` raises, if it does, without its traceback: that would keep all that it had computed."""
    try:
        work(group)
    except Exception as error:
        return error.with_traceback(None)
    return None


def _failed(slot: Slot, error: Exception) -> Failed:
    first = (str(error).strip().split("\n") or [""])[0]
    if base.out_of_memory(error):
        return Failed(slot, "oom", first)
    return Failed(slot, "error", f"{type(error).__name__}: {first}")


def _not_finite(slot: Slot, what: str) -> Failed:
    return Failed(slot, "nan", f"{what} is no finite number at step {slot.progress.step + 1}")
