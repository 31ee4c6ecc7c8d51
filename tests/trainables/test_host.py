"""Engines as actors on a real Ray: slots are taken, freed and taken again; a lost engine loses nothing but time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import another_base

from cluster import session
from trainables import host, packed, placement
from trainables.capacity import MemoryModel
from trainables.contract import CannotPack, Report, TrialConfig, TrialFailure
from trainables.data.snapshot import Snapshot
from trainables.host import EngineConfig
from trainables.placement import Move, Occupancy
from trainables.spec import BaseModelSpec, TrainingSpec


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with session.forked(["trainables.engine"]), session.connected():
        yield


@pytest.fixture
def trial(tiny: BaseModelSpec, tickets: Snapshot) -> Callable[..., TrialConfig]:
    def make(name: str, **training: Any) -> TrialConfig:
        values = {"r": 4, "learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8}
        return TrialConfig(name, tiny, TrainingSpec(**values | training), str(tickets.directory), 8)

    return make


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[tuple[int, int], list[Any]]]:
    """The engines of the test before, by their number and capacity: each takes ten seconds to start."""
    running: dict[tuple[int, int], list[Any]] = {}
    yield running
    for engines in running.values():
        host.stop(engines)


@pytest.fixture
def engines(trial, kept) -> Callable[..., list[Any]]:
    def start(count: int, capacity: int) -> list[Any]:
        if (count, capacity) not in kept:
            for others in kept.values():
                host.stop(others)  # for their cores
            kept.clear()
            kept[count, capacity] = host.start(count, {"CPU": 1}, as_engine(trial("any"), capacity))
        return kept[count, capacity]

    return start


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., tuple[Future[None], list[Report]]]]:
    """Runs a trial on engines in a thread, as Tune does in a process; its future and its reports so far."""
    pool = ThreadPoolExecutor(8)

    def start(engines: list[Any], config: TrialConfig, resume_from: Path | None = None) -> Any:
        reports: list[Report] = []
        workdir = tmp_path / config.trial_id
        workdir.mkdir(exist_ok=True)
        note = lambda report, _: reports.append(report)  # noqa: E731
        return pool.submit(host.run_trial, engines, config, workdir, resume_from, note), reports

    yield start
    pool.shutdown(wait=False, cancel_futures=True)


def as_engine(config: TrialConfig, capacity: int, memory_bytes: float | None = None) -> EngineConfig:
    training = config.training
    return EngineConfig(config.base_model, config.dataset, training, training, capacity, memory_bytes)


def curve(reports: list[Report]) -> list[tuple[int, float]]:
    return [(report.step, report.eval_loss) for report in reports]


def alone(config: TrialConfig, workdir: Path) -> list[tuple[int, float]]:
    """On one thread, as Ray gives an engine of one CPU: a matrix product's bits may depend on how it is shared out."""
    reports: list[Report] = []
    workdir.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed.run_trial(config, workdir, None, lambda report, _: reports.append(report))
    torch.set_num_threads(threads)
    return curve(reports)


def eventually(holds: Callable[[], bool], otherwise: str) -> None:
    """Waits: an engine's threads take calls in any order, so one that nobody waits for may come after the next."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def wait_for(reports: list[Report], count: int) -> None:
    eventually(lambda: len(reports) >= count, "no report in time")


def test_trials_on_two_engines_are_what_they_would_be_alone(trial, engines, submit, tmp_path: Path) -> None:
    both = engines(2, capacity=1)
    configs = [trial("a"), trial("b", r=8, seed=1), trial("c", learning_rate=1e-3)]
    running = [submit(both, config) for config in configs]
    for config, (future, reports) in zip(configs, running, strict=True):
        future.result(timeout=120)
        assert curve(reports) == alone(config, tmp_path / f"alone-{config.trial_id}")
        assert [report.last for report in reports] == [False] * (len(reports) - 1) + [True]
    found = host.Accounts(both).last()
    assert {stay["trial_id"] for account in found for stay in account["stays"]} == {"a", "b", "c"}
    assert all(account["counters"]["base_loads"] == 1 for account in found)
    assert all(account["counters"]["alone_s"] > 0 for account in found)


def test_an_evicted_trials_slot_goes_to_the_one_that_waits(trial, engines, submit) -> None:
    one = engines(2, capacity=1)[:1]
    first, seen = submit(one, trial("first", num_train_epochs=50))
    wait_for(seen, 1)
    second, reports = submit(one, trial("second"))
    assert not reports
    one[0].evict.remote("first")
    first.result(timeout=60)
    second.result(timeout=120)
    assert len(reports) == 4
    stays = ray.get(one[0].account.remote())["stays"]
    assert [(stay["trial_id"], stay["slot"], stay["ending"]) for stay in stays][-2:] == [
        ("first", 0, "evicted"),
        ("second", 0, "ended"),
    ]


def test_a_trial_that_is_over_trains_nowhere_again(trial, engines, submit) -> None:
    """Stopped on its way to a slot, when no engine has it: it must not come to one later."""
    both = engines(2, capacity=1)
    ray.get(host.evict(both, "stopped", for_good=True))
    future, reports = submit(both, trial("stopped"))
    future.result(timeout=60)
    assert not reports
    assert [ray.get(engine.occupancy.remote()) for engine in both] == [Occupancy(1, {})] * 2
    assert not ray.get(both[0].reserve.remote("stopped", placement.bucket(trial("stopped").training), moves=True))


def test_a_slot_is_kept_for_a_trial_until_it_comes_and_not_before_it_has_left(trial, engines, submit) -> None:
    engine, _ = engines(2, capacity=1)
    bucket = placement.bucket(trial("a").training)
    assert ray.get(engine.reserve.remote("a", bucket))
    assert ray.get(engine.leave.remote("a", 1))
    assert ray.get(engine.occupancy.remote()) == Occupancy(0, {})
    assert not ray.get(engine.reserve.remote("a", bucket, moves=True))
    assert not ray.get(engine.leave.remote("b", 1)), "it is not here"
    ray.get(engine.evict.remote("a"))
    assert ray.get(engine.reserve.remote("a", bucket)), "it is stopped, and may be tried again"
    ray.get(engine.withdraw.remote("a"))
    assert ray.get(engine.occupancy.remote()) == Occupancy(1, {})
    future, reports = submit([engine], trial("a", num_train_epochs=1))
    wait_for(reports, 1)
    ray.get(engine.withdraw.remote("a"))
    future.result(timeout=60)
    assert len(reports) == 2, "it has come, and no reservation is left to withdraw"


def test_a_trial_moves_to_an_engine_that_has_run_dry_and_stays_the_same(trial, engines, submit, tmp_path: Path) -> None:
    both = engines(2, capacity=2)
    configs = [trial("a", num_train_epochs=12), trial("b", num_train_epochs=50), trial("c", num_train_epochs=8, r=8)]
    running = []
    for config in configs:  # to engines 0, 1 and 0
        running.append(submit(both, config))
        wait_for(running[-1][1], 1)
    ray.get(both[1].evict.remote("b"))
    for _ in range(100):  # on each report and each end of a sweep; the more often, the more may go wrong
        host.even_out(both, "b", goes_on=False)
    for future, _ in running:
        future.result(timeout=240)
    found = host.Accounts(both).last()
    first, second = ({stay["trial_id"]: stay["ending"] for stay in account["stays"]} for account in found)
    assert first == {"a": "ended", "c": "moved"}
    assert second == {"b": "evicted", "c": "ended"}
    came_to = sum(stay["steps"] for account in found for stay in account["stays"] if stay["ending"] != "moved")
    assert sum(account["counters"]["adapter_steps"] for account in found) == came_to, "no step is taken twice"
    assert curve(running[2][1]) == alone(configs[2], tmp_path / "alone")


def test_a_slot_that_was_kept_in_vain_or_lost_costs_nothing(
    trial, engines, submit, monkeypatch, tmp_path: Path
) -> None:
    both = engines(2, capacity=2)
    config = trial("kept", num_train_epochs=12)
    future, reports = submit(both, config)
    wait_for(reports, 1)
    held = [{stay["trial_id"] for stay in account["stays"]} for account in host.Accounts(both).last()]
    here = next(place for place, trials in enumerate(held) if "kept" in trials)
    there = 1 - here
    assert ray.get(both[here].reserve.remote("ends", placement.bucket(config.training)))
    moves = [Move("ends", here, there)]

    def ends_just_then(_: list[Occupancy]) -> Move | None:
        ray.get(both[here].evict.remote("ends"))
        return moves.pop() if moves else None

    with monkeypatch.context() as patched:
        patched.setattr(placement, "evener", ends_just_then)
        host.even_out(both, "another", goes_on=False)
    assert not moves
    eventually(lambda: ray.get(both[there].occupancy.remote()) == Occupancy(2, {}), "the slot is not given back")
    (answer,) = both[there].train.options(num_returns="streaming").remote(config, None)
    assert ray.get(answer) == ("moved", None, None), "nothing is kept for it here, so it asks again"
    assert ray.get(both[here].leave.remote("kept", there))
    future.result(timeout=240)
    assert curve(reports) == alone(config, tmp_path / "alone")


def test_a_failure_is_its_own_trials_alone(trial, engines, submit, tmp_path: Path) -> None:
    one = engines(2, capacity=2)[:1]
    healthy = trial("healthy")
    future, reports = submit(one, healthy)
    broken, _ = submit(one, trial("broken", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0))
    (tmp_path / "foreign").mkdir()
    foreign, _ = submit(one, trial("foreign"), tmp_path / "foreign")
    with pytest.raises(TrialFailure) as nan:
        broken.result(timeout=120)
    with pytest.raises(TrialFailure) as unreadable:
        foreign.result(timeout=120)
    future.result(timeout=120)
    assert (nan.value.reason, unreadable.value.reason) == ("nan", "error")
    assert curve(reports) == alone(healthy, tmp_path / "alone")


def test_an_engine_holds_as_many_as_its_memory_does(trial, engines) -> None:
    (roomy,) = engines(1, capacity=2)
    account = ray.get(roomy.account.remote())
    assert account["capacity"] == 2
    model = MemoryModel(**account["memory"])
    assert model.slots(account["memory_bytes"]) > 4
    (small,) = host.start(1, {"CPU": 1}, as_engine(trial("any"), 4, model.needed(2) + 1))
    assert ray.get(small.capacity.remote()) == 2
    host.stop([small])


def test_a_lost_engine_comes_back_and_its_trials_go_on(trial, engines, submit, tmp_path: Path) -> None:
    one = engines(1, capacity=2)
    config = trial("watched", num_train_epochs=8)
    future, reports = submit(one, config)
    wait_for(reports, 2)
    accounts = host.Accounts(one)
    (before,) = accounts.last()
    ray.kill(one[0], no_restart=False)
    future.result(timeout=240)
    assert curve(reports) == alone(config, tmp_path / "alone")
    lost, then = accounts.last()
    assert (before["stays"][-1]["left_s"], before["stays"][-1]["ending"]) == (None, "running")
    assert lost == before | {
        "stays": [*before["stays"][:-1], before["stays"][-1] | {"left_s": before["age_s"], "ending": "lost"}]
    }
    assert [stay["ending"] for stay in then["stays"]] == ["ended"]
    again, more = submit(one, config, tmp_path / "watched" / "handed-out")
    again.result(timeout=60)
    assert more == [], "its last report was all that was left to make"


def test_what_engines_did_is_known_though_one_of_them_is_gone(engines) -> None:
    two = engines(2, capacity=1)
    ray.kill(two[0])  # returns before it is gone
    eventually(lambda: len(host.Accounts(two).last()) == 1, "the other one's account alone")


def test_an_engine_that_says_nothing_does_not_silence_the_other() -> None:
    never = ray.remote(num_cpus=1000)(lambda: None).remote()
    said = [never, ray.put(told(1, steps=1)), ray.put(told(2, steps=5)), ray.put(told(2, steps=6)), gone()]
    engine = SimpleNamespace(account=SimpleNamespace(remote=lambda: said.pop(0)))
    accounts = host.Accounts([engine, engine])  # of which the first one is never done answering
    for _ in range(4):
        accounts.look()
    assert said == []
    ray.cancel(never)
    accounts.engines = []
    assert [account["stays"] for account in accounts.last()] == [
        [{"left_s": 2.0, "ending": "lost", "steps": 1}],
        [{"left_s": 2.0, "ending": "lost", "steps": 6}],
    ]
    assert host.Accounts([]).last() == []


def told(process: int, steps: int) -> dict[str, Any]:
    """An engine's account, as far as ``Accounts`` reads it."""
    stays = [{"left_s": None, "ending": "running", "steps": steps}]
    return {"node_id": "node", "process": process, "age_s": 2.0, "stays": stays}


def gone() -> ray.ObjectRef:
    """What an engine answers that is not there any more."""

    def fail() -> None:
        raise OSError("gone")

    return ray.remote(fail).remote()


def test_an_engine_whose_base_cannot_be_shared_says_so(trial, tmp_path: Path) -> None:
    config = trial("any")
    other = replace(config, base_model=another_base(config.base_model, tmp_path / "base", attention_dropout=0.1))
    with pytest.raises(CannotPack, match="attention has dropout"):
        host.start(1, {"CPU": 1}, as_engine(other, capacity=1))


def test_an_engine_that_cannot_start_is_one_clear_error(trial, tmp_path: Path) -> None:
    config = trial("any")
    nowhere = replace(as_engine(config, capacity=1), dataset=str(tmp_path / "no-data"))
    with pytest.raises(RuntimeError, match="an engine did not start"):
        host.start(1, {"CPU": 1}, nowhere)
