"""Engines on the cluster: each an actor on a device of its own, kept for a whole sweep, and trials that train on them.

A trial's own process only relays: it finds a free slot, hands reports and checkpoints on, and goes on from its last
checkpoint where an engine was lost.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from cluster import files, session
from trainables import placement
from trainables.contract import CannotPack, Measurement, Report, ReportFunction, TrialConfig, TrialFailure
from trainables.outboxes import END, Message, Outboxes
from trainables.placement import Bucket, Move, Occupancy
from trainables.spec import BaseModelSpec, TrainingSpec

if TYPE_CHECKING:
    from trainables.capacity import MemoryModel

_POLL_S = 0.1
_ANSWER_S = 5.0
"""For which Tune's own loop waits for an engine."""
_ACCOUNT_S = 30.0
"""For which a sweep's end waits for an engine's answer."""
_FIRST_S = 3.0
"""For which an engine's first trial waits for others: in step, they come to a rung together and are judged together."""


@dataclass(frozen=True)
class EngineConfig:
    """All that an engine depends on."""

    base_model: BaseModelSpec
    dataset: str
    """Absolute directory of the data snapshot."""
    training: TrainingSpec
    """Of a typical trial, to measure what one alone costs."""
    largest: TrainingSpec
    """The most that a trial may ask for, to measure how many fit."""
    capacity: int
    """Slots that are wanted; memory may allow fewer."""
    memory_bytes: float | None = None
    """That the engine may use; None: most of its GPU's, or of its cores' share of the machine's."""
    measurement: Measurement | None = None
    """What is asked of adapters here, on a base beside the shared one."""


def start(count: int, resources: dict[str, float], config: EngineConfig) -> list[ray.actor.ActorHandle]:
    """Start ``count`` engines and wait until each has its base and knows how many trials it holds.

    Raises:
        CannotPack: the base is none that engines can share.
        RuntimeError: an engine could not load its base.
    """
    make: Any = ray.remote(  # type: ignore[call-overload]
        num_cpus=resources.get("CPU", 1),
        num_gpus=resources.get("GPU", 0),
        max_concurrency=2 * config.capacity + 8,  # a waiting call for each trial, and room for short ones
        max_restarts=3,
        scheduling_strategy="SPREAD",
    )
    engines = [make(EngineHost).remote(config) for _ in range(count)]
    try:
        obstacles = ray.get([engine.obstacle.remote() for engine in engines])
    except RayActorError as error:
        stop(engines)
        raise RuntimeError(f"an engine did not start: {str(error).strip().splitlines()[-1]}") from error
    if found := next(filter(None, obstacles), None):
        stop(engines)
        raise CannotPack(found)
    return engines


class Accounts:
    """What engines did, by ``EngineHost.account``: one that Ray starts again has another account.

    Of one that does not answer it is as it was when last looked at; what it trained then counts as lost.
    """

    def __init__(self, engines: Sequence[ray.actor.ActorHandle]) -> None:
        self.engines = engines
        self._found: dict[tuple[str, int], dict[str, Any]] = {}
        self._asked: dict[int, ray.ObjectRef] = {}

    def look(self) -> None:
        """Take note of what engines have answered since the last time, and ask them again; waits for none."""
        self._take_note()
        for place, engine in enumerate(self.engines):
            if place not in self._asked:
                self._asked[place] = engine.account.remote()

    def last(self) -> list[dict[str, Any]]:
        """Of all engines that there were; waits for those that are there."""
        self._take_note()
        asked: list[ray.ObjectRef] = [engine.account.remote() for engine in self.engines]
        alive = [self._note(answer, _ACCOUNT_S) for answer in asked]
        return [account if life in alive else _lost(account) for life, account in self._found.items()]

    def _take_note(self) -> None:
        asked = {answer: place for place, answer in self._asked.items()}
        ready: list[Any] = ray.wait([*asked], num_returns=len(asked), timeout=0)[0] if asked else []
        for answer in ready:
            self._note(answer)
            del self._asked[asked[answer]]

    def _note(self, answer: ray.ObjectRef, timeout_s: float | None = None) -> tuple[str, int] | None:
        """Whose it is, None where there is no answer."""
        try:
            account: Any = ray.get(answer, timeout=timeout_s)
        except RayError:
            return None
        life = (account["node_id"], account["process"])
        self._found[life] = account
        return life


def _lost(account: dict[str, Any]) -> dict[str, Any]:
    """An engine's account, with trials that were training in it as ended by its loss."""
    until = {"left_s": account["age_s"], "ending": "lost"}
    return account | {"stays": [stay | until if stay["left_s"] is None else stay for stay in account["stays"]]}


def evict(engines: Sequence[ray.actor.ActorHandle], trial_id: str, for_good: bool = False) -> list[ray.ObjectRef]:
    """Free a trial's slot and any that is kept for it; does not wait for it.

    Args:
        for_good: the trial is over, wherever it is on its way to.
    """
    return [engine.evict.remote(trial_id, for_good) for engine in engines]


def even_out(engines: Sequence[ray.actor.ActorHandle], judged: str, goes_on: bool) -> None:
    """Move trials from busy engines to less busy ones. For one caller at a time, and once no other trial is to come.

    Args:
        judged: the trial that has just been judged, to go on or not; its engine may not know yet.
    """
    with suppress(RayError):  # an engine is lost, or does not answer; its trials find out themselves
        while True:
            occupancies = [engine.told(judged, goes_on) for engine in _occupancies(engines, _ANSWER_S)]
            move = placement.evener(occupancies)
            if move is None or not _moved(engines, move, occupancies[move.here].buckets[move.trial_id]):
                return


def _moved(engines: Sequence[ray.actor.ActorHandle], move: Move, bucket: Bucket) -> bool:
    """Whether a trial is about to leave for a slot that is kept for it."""
    trial_id, here, there = move
    left = False
    try:
        if ray.get(engines[there].reserve.remote(trial_id, bucket, moves=True), timeout=_ANSWER_S):
            left = ray.get(engines[here].leave.remote(trial_id, there), timeout=_ANSWER_S)
    finally:
        if not left:
            engines[there].withdraw.remote(trial_id)
    return left


def stop(engines: Sequence[ray.actor.ActorHandle]) -> None:
    for engine in engines:
        ray.kill(engine)


class EngineHost:
    """One engine in a process of its own: a thread trains, callers wait for what their trial reports."""

    def __init__(self, config: EngineConfig) -> None:
        session.use_what_ray_gave()
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # hardly two passes have one size
        from trainables.data import snapshot
        from trainables.engine import Engine

        training = config.training
        self._obstacle: str | None = None
        try:
            self.engine = Engine(
                config.base_model,
                snapshot.load(Path(config.dataset)),
                training.target_modules,
                config.capacity,
                training.gradient_checkpointing,
            )
            self._start(config)
        except CannotPack as error:  # told, where an exception would have Ray start this again
            self._obstacle = str(error)

    def _start(self, config: EngineConfig) -> None:
        from trainables import probe

        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self.memory_bytes = config.memory_bytes or probe.device_memory(self.engine.device, cpus)
        self.memory = self._probe(config.training, config.largest, config.measurement is not None)
        self.examiner = self._examiner(config)
        self.changed = threading.Condition()
        self.outboxes = Outboxes()
        self.buckets: dict[str, Bucket] = {}
        self.expected = set[str]()
        self.over = set[str]()
        self.leaving: dict[str, int] = {}
        self.arriving: list[tuple[TrialConfig, dict[str, bytes] | None]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _examiner(self, config: EngineConfig) -> Any:
        from trainables.objectives import Examiner

        return Examiner(config.measurement, config.dataset) if config.measurement else None

    def _probe(self, training: TrainingSpec, largest: TrainingSpec, measures: bool) -> MemoryModel | None:
        """What a trial costs here, and with that the engine's capacity.

        Where not even a probe fits, trials are let in one by one: each then fails as ``oom``, which is its result.
        """
        from trainables import base, probe

        try:
            model = probe.memory(self.engine, largest)
            self.memory_bytes -= model.for_answers if measures else 0
            self.engine.limit(model.slots(self.memory_bytes))
            self.engine.keep_dequantised(model.keeps_dequantised(self.engine.capacity, self.memory_bytes))
            alone = probe.alone(self.engine, training)
            self.engine.counters.alone_tokens, self.engine.counters.alone_s = alone
            return model
        except Exception as error:
            if not base.out_of_memory(error):
                raise
            self.engine.keep_dequantised(False)
            self.engine.limit(1)
            return None

    def obstacle(self) -> str | None:
        """Why this engine takes no trials, if it does not; answers once the base is loaded."""
        return self._obstacle

    def capacity(self) -> int:
        """Slots."""
        return self.engine.capacity

    def reserve(self, trial_id: str, bucket: Bucket, moves: bool = False) -> bool:
        """Keep a slot for a trial, if one is free; one that ``moves`` here must have left before it comes back. A trial
        that is over needs none.
        """
        with self.changed:
            if trial_id in self.over:
                return not moves
            known = trial_id in self.outboxes
            if (known and moves) or (not known and len(self.outboxes) >= self.engine.capacity):
                return False
            self.outboxes.open(trial_id)
            self.buckets[trial_id] = bucket
            self.expected.add(trial_id)
            return True

    def withdraw(self, trial_id: str) -> None:
        """Give a reservation back, unless the trial has come by now."""
        with self.changed:
            if trial_id in self.expected:
                self.evict(trial_id)

    def occupancy(self) -> Occupancy:
        with self.changed:
            buckets = {trial_id: self.buckets[trial_id] for trial_id in self.outboxes if trial_id not in self.leaving}
            judged, here = self.outboxes.judged, {slot.trial_id for slot in list(self.engine.slots)}
            movable = (here & buckets.keys()) - judged - self.expected
            return Occupancy(self.engine.capacity - len(self.outboxes), buckets, judged, movable)

    def train(self, config: TrialConfig, checkpoint: dict[str, bytes] | None) -> Iterator[Message]:
        """Train in the slot reserved for the trial, from a checkpoint's files where there are some."""
        with self.changed:
            over, outbox = config.trial_id in self.over, self.outboxes.get(config.trial_id)
            if outbox is not None:
                self.expected.discard(config.trial_id)
                self.arriving.append((config, checkpoint))
                self.changed.notify()
        if outbox is None:
            yield END if over else ("moved", None, checkpoint)  # to anywhere: the reservation is lost
            return
        while True:
            message = outbox.get()
            yield message
            if message[0] != "report":
                return

    def evict(self, trial_id: str, for_good: bool = False) -> None:
        """Free a trial's slot before the next step. Of a trial that is not here it only takes note, if that is over."""
        with self.changed:
            if for_good:
                self.over.add(trial_id)
            self.arriving = [arrival for arrival in self.arriving if arrival[0].trial_id != trial_id]
            self.leaving.pop(trial_id, None)
            self.expected.discard(trial_id)
            self.outboxes.close(trial_id)

    def leave(self, trial_id: str, place: int) -> bool:
        """Hand a trial over before its next step, to go on in the engine at ``place``; False where it has ended."""
        with self.changed:
            if trial_id not in self.outboxes:
                return False
            self.leaving[trial_id] = place
            return True

    def decided(self, trial_id: str) -> None:
        """A trial's report has been judged; the next one may go out."""
        with self.changed:
            self.outboxes.decided(trial_id)

    def measure(self, adapter: dict[str, bytes]) -> dict[str, float]:
        """What an adapter's files answer; other trials train on meanwhile."""
        with _scratch("measure") as scratch:
            files.write_tree(scratch, adapter)
            return self.examiner.measure(scratch)

    def account(self) -> dict[str, Any]:
        """Counted work, which trial held which slot from when to when, and what the engine knows of its memory."""
        steps = {slot.trial_id: slot.progress.step for slot in list(self.engine.slots)}
        stays = [asdict(stay) for stay in list(self.engine.stays)]  # while they train on
        for stay in stays:
            if stay["left_s"] is None:
                stay["steps"] = steps.get(stay["trial_id"], 0)
        return {
            "counters": asdict(self.engine.counters) | {"dequantisations": self.engine.dequantisations},
            "node_id": ray.get_runtime_context().get_node_id(),
            "process": os.getpid(),
            "age_s": self.engine.age_s,
            "capacity": self.engine.capacity,
            "memory": self.memory.as_dict() if self.memory else None,
            "memory_bytes": self.memory_bytes,
            "keeps_dequantised": self.engine.keeps_dequantised,
            "stays": stays,
        }

    def _run(self) -> None:
        """The training thread. An error here is the engine's own: the process ends, Ray starts it again."""
        try:
            while True:
                self._turn()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _turn(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.arriving or self.engine.slots)
            if not self.engine.stays:
                self.changed.wait_for(lambda: len(self.arriving) >= self.engine.capacity, _FIRST_S)
            arriving, self.arriving = self.arriving, []
            coming = {config.trial_id for config, _ in arriving}  # back before its old slot was free
            for slot in list(self.engine.slots):
                if slot.trial_id not in self.outboxes or slot.trial_id in coming:
                    self.engine.evict(slot.trial_id)
            going = [(slot, self.leaving[slot.trial_id]) for slot in self.engine.slots if slot.trial_id in self.leaving]
        for slot, place in going:
            self._hand_over(slot, place)
        for config, checkpoint in arriving:
            self._admit(config, checkpoint)
        if self.engine.slots:
            self._deliver(self.engine.advance())

    def _admit(self, config: TrialConfig, checkpoint: dict[str, bytes] | None) -> None:
        from trainables import base

        with _scratch(config.trial_id) as scratch:
            if checkpoint is not None:
                files.write_tree(scratch, checkpoint)
            try:
                slot = self.engine.admit(config, scratch if checkpoint is not None else None)
                if slot.ended:  # whoever took its last report did not live to say so
                    self.engine.evict(config.trial_id, "ended")
                    self._tell(config.trial_id, END)
            except Exception as error:  # one trial's checkpoint or settings must not end its neighbours
                reason = "oom" if base.out_of_memory(error) else "error"
                self._tell(config.trial_id, ("failed", reason, f"{type(error).__name__}: {error}"))

    def _hand_over(self, slot: Any, place: int) -> None:
        with _scratch(slot.trial_id) as scratch:
            self.engine.hand_over(slot, scratch / "state")
            state = files.read_tree(scratch / "state")
        with self.changed:
            self.leaving.pop(slot.trial_id, None)
            self._tell(slot.trial_id, ("moved", place, state))

    def _deliver(self, events: Sequence[Any]) -> None:
        from trainables.engine import Failed

        for event in events:
            if isinstance(event, Failed):
                self._tell(event.slot.trial_id, ("failed", event.reason, event.message))
                continue
            with _scratch("checkpoint") as scratch:
                event.slot.save(scratch / "checkpoint", event.report)
                saved = files.read_tree(scratch / "checkpoint")
            self._tell(event.slot.trial_id, ("report", event.report, saved))
            if event.slot.ended:
                self._tell(event.slot.trial_id, END)

    def _tell(self, trial_id: str, message: Message) -> None:
        """Tell a trial's caller; a last message gives its reservation back."""
        with self.changed:
            self.outboxes.tell(trial_id, message)


def run_trial(
    engines: Sequence[ray.actor.ActorHandle],
    config: TrialConfig,
    workdir: Path,
    resume_from: Path | None,
    report: ReportFunction,
) -> None:
    """As a backend's ``run_trial``, in the first free slot of ``engines``.

    Raises:
        TrialFailure: as the engine reported it.
        RayActorError: every engine is gone for good.
    """
    checkpoint = files.read_tree(resume_from) if resume_from else None
    relay, place = _Relay(engines, config, workdir, report, checkpoint), None
    try:
        while not relay.ended:
            here = _reserve(engines, config, place)
            try:
                place = relay.follow(here)
            except RayActorError:  # Ray is starting it again, or another engine has a slot
                place = None
                for evicted in evict(engines, config.trial_id):
                    with suppress(RayActorError):
                        ray.get(evicted)
                time.sleep(_POLL_S)
    finally:
        evict(engines, config.trial_id)


def measure(engines: Sequence[ray.actor.ActorHandle], adapter: Path) -> dict[str, float]:
    """What an adapter answers, on the engine with most free slots.

    Raises:
        RayActorError: every engine is gone for good.
    """
    files_of_it = files.read_tree(adapter)
    while True:
        free = [occupancy.free for occupancy in _occupancies(engines)]
        try:
            return ray.get(engines[free.index(max(free))].measure.remote(files_of_it))  # type: ignore[return-value]
        except RayActorError:
            time.sleep(_POLL_S)  # Ray is starting it again


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"winnow-{name}-") as directory:
        yield Path(directory)


@dataclass
class _Relay:
    """A trial's process: what it hands to the engines and what it takes from them."""

    engines: Sequence[ray.actor.ActorHandle]
    config: TrialConfig
    workdir: Path
    report: ReportFunction
    checkpoint: dict[str, bytes] | None
    ended: bool = False

    def follow(self, here: int) -> int | None:
        """Train in one engine, to the end or until it hands the trial over: the place of the engine to go on in."""
        engine = self.engines[here]
        messages: Any = engine.train.options(num_returns="streaming").remote(self.config, self.checkpoint)
        for reference in messages:
            kind, first, second = ray.get(reference)
            if kind == "failed":
                raise TrialFailure(first, second)
            if kind == "moved":
                self.checkpoint = second
                return first
            if kind == "ended":
                break
            self._reported(first, second)
            engine.decided.remote(self.config.trial_id)
        self.ended = True
        return None

    def _reported(self, made: Report, saved: dict[str, bytes]) -> None:
        self.checkpoint = saved
        handed = self.workdir / "handed-out"
        shutil.rmtree(handed, ignore_errors=True)
        files.write_tree(handed, saved)
        self.report(made, handed)


def _reserve(engines: Sequence[ray.actor.ActorHandle], config: TrialConfig, kept: int | None) -> int:
    """A slot in the engine that suits the trial best; waits while all are taken or starting again.

    Args:
        kept: the place of the engine that has kept one; it may have been lost since.
    """
    own = placement.bucket(config.training)
    while True:
        places, kept = placement.preferred(own, _occupancies(engines)) if kept is None else [kept], None
        for place in places:
            with suppress(RayActorError):
                if ray.get(engines[place].reserve.remote(config.trial_id, own)):
                    return place
        time.sleep(_POLL_S)


def _occupancies(engines: Sequence[ray.actor.ActorHandle], timeout_s: float | None = None) -> list[Occupancy]:
    """No slot is free in an engine that is starting again.

    Raises:
        ActorDiedError: every engine is gone for good.
        GetTimeoutError: one did not answer in time.
    """
    found: list[Occupancy] = []
    dead = 0
    for engine in engines:
        try:
            found.append(ray.get(engine.occupancy.remote(), timeout=timeout_s))  # type: ignore[arg-type]
        except RayActorError as error:
            found.append(Occupancy(-1, {}))
            dead += isinstance(error, ActorDiedError)
            if dead == len(engines):
                raise
    return found
