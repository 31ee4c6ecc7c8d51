"""A timetable driven by a clock of the test's own, and what comes together from several ingress replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import until
from test_registry import put

from serving import registry
from serving.conductor import Conductor, Delta, Ledger, Timetable
from serving.counts import Counts
from serving.judgement import Decision, Judgement
from serving.spec import CanarySpec

SPEC = CanarySpec(steps=(10, 50), step_s=60, min_requests=20)


@pytest.fixture
def versions(home: Path) -> tuple[str, str]:
    """Production, and a canary at the first step of its timetable."""
    first, second = put(home, "one").version, put(home, "two").version
    registry.set_alias("tickets", "production", first, "test")
    registry.set_canary("tickets", second, 10, "canary", 0)
    return first, second


def count(total: dict, versions: tuple[str, str], requests: int = 50, errors: int = 0) -> None:
    """So many more of each variant, the canary's with errors."""
    for version, variant, bad in zip(versions, ("production", "canary"), (0, errors), strict=True):
        one = Counts(requests=requests, errors=bad)
        for _ in range(requests - bad):
            one.latency.add(0.1)
        total.setdefault((version, variant), Counts()).merge(one)


def reasons() -> list[str]:
    return [entry["reason"].partition(":")[0] for entry in registry.history("tickets")[2:]]


def test_a_good_canary_goes_through_its_steps_and_becomes_production(versions) -> None:
    timetable, total = Timetable("tickets", SPEC), {}
    timetable.tick(0, total)
    count(total, versions)
    timetable.tick(59, total)
    assert registry.canary("tickets")["weight"] == 10, "a step takes its time"
    timetable.tick(60, total)
    assert registry.canary("tickets")["weight"] == 50
    timetable.tick(61, total)
    timetable.tick(200, total)
    assert registry.canary("tickets")["weight"] == 50, "what the step before counted does not count for this one"
    count(total, versions)
    timetable.tick(201, total)
    assert registry.aliases("tickets") == {"production": versions[1], "served": versions[1], "previous": versions[0]}
    assert reasons() == ["hold", "hold", "advance", "hold", "advance", "advance"]
    assert timetable.tick(300, total) is None


def test_a_bad_canary_goes_back_at_once(versions) -> None:
    timetable, total = Timetable("tickets", SPEC), {}
    timetable.tick(0, total)
    count(total, versions, errors=25)
    timetable.tick(1, total)
    assert registry.aliases("tickets") == {"production": versions[0]}
    assert registry.canary("tickets") is None
    assert "error rate 0.500 (25 of 50)" in registry.history("tickets")[-1]["reason"]


def test_a_second_canary_is_judged_by_its_own_counts(versions) -> None:
    timetable, total = Timetable("tickets", SPEC), {}
    timetable.tick(0, total)
    count(total, versions, errors=25)
    timetable.tick(1, total)
    registry.set_canary("tickets", versions[1], 10, "again", 0)
    timetable.tick(2, total)
    assert registry.canary("tickets") is not None
    count(total, versions)
    timetable.tick(62, total)
    assert registry.canary("tickets")["weight"] == 50


@pytest.mark.parametrize("decision", [Decision.ADVANCE, Decision.ROLL_BACK])
@pytest.mark.parametrize("steps", [(10,), (10, 50)])
def test_what_somebody_moved_while_it_was_judged_stays(versions, decision: Decision, steps: tuple) -> None:
    """A rollback by hand, and another canary, come between the judgement and what follows from it."""
    timetable, plan = Timetable("tickets", CanarySpec(steps=steps)), registry.canary("tickets")
    registry.roll_back("tickets", "by hand")
    timetable._act(plan, Judgement(decision, "seen"))
    assert registry.aliases("tickets") == {"production": versions[0]}
    registry.set_canary("tickets", versions[1], 30, "by hand")
    before = registry.canary("tickets")
    timetable._act(plan, Judgement(decision, "seen"))
    assert registry.canary("tickets") == before


def test_a_canary_that_people_move_is_left_alone(versions) -> None:
    registry.set_canary("tickets", versions[1], 30, "an A/B test")
    timetable, total = Timetable("tickets", SPEC), {}
    count(total, versions, errors=50)
    assert timetable.tick(1000, total) is None
    assert registry.canary("tickets")["weight"] == 30


def test_a_reason_to_hold_is_history_once(versions) -> None:
    timetable, total = Timetable("tickets", SPEC), {}
    for second in range(30):
        timetable.tick(second, {})
    assert reasons() == ["hold"]
    for second in range(30, 60):  # the numbers in it change with every request
        count(total, versions)
        total[versions[1], "canary"].merge(Counts(requests=9, rejected=9))
        timetable.tick(second, total)
    assert reasons() == ["hold", "hold"]


def test_a_last_step_of_100_is_the_promotion(versions) -> None:
    timetable, total = Timetable("tickets", CanarySpec(steps=(10, 100), step_s=60, min_requests=20)), {}
    timetable.tick(0, total)
    count(total, versions)
    timetable.tick(60, total)
    assert registry.aliases("tickets") == {"production": versions[1], "served": versions[1], "previous": versions[0]}


async def _conductor() -> Conductor:
    made = Conductor.__new__(Conductor)
    await made.__init__("tickets", {})  # type: ignore[misc]
    return made


def test_counts_of_several_replicas_come_together_and_feedback_finds_its_variant(versions) -> None:
    async def scenario() -> None:
        conductor = await _conductor()
        one, other = Delta(), Delta()
        one.add("v1", "production", "answer-1", Counts(requests=1))
        other.add("v1", "production", "answer-2", Counts(requests=1))
        other.add("v2", "canary", "answer-3", Counts(requests=1))
        await conductor.report("a", one)
        await conductor.report("b", other)
        assert await conductor.feedback("answer-3", 0.25)
        assert not await conductor.feedback("answer-4", 1.0)
        found = (await conductor.variants())["variants"]
        assert {who: counts["requests"] for who, counts in found.items()} == {"v1 production": 2, "v2 canary": 1}
        assert found["v2 canary"]["feedback_mean"] == 0.25
        await conductor.report("b", other)
        assert await conductor.feedback("answer-3", 1.0)
        scored = (await conductor.variants())["variants"]["v2 canary"]
        assert (scored["feedback"], scored["feedback_mean"]) == (1, 0.25), "an answer is scored once"
        conductor._clock.cancel()

    asyncio.run(scenario())


def test_storage_that_is_away_for_a_moment_costs_no_counts(versions, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    def away(_: object, now: float, __: object) -> None:
        ticks.append(now)
        raise OSError("stale file handle")

    monkeypatch.setattr("serving.conductor._TICK_S", 0.01)
    monkeypatch.setattr(Timetable, "tick", away)

    async def scenario() -> None:
        conductor = await _conductor()
        await until(lambda: len(ticks) > 2)
        await conductor.check_health()
        conductor._clock.cancel()

    asyncio.run(scenario())


def test_each_replica_learns_what_the_others_let_a_key_spend(versions) -> None:
    async def scenario() -> None:
        conductor = await _conductor()
        for name in ("a", "b"):
            assert await conductor.report(name, Delta()) == {}
        await conductor.report("a", Delta(spent={"ada": (2, 30)}))
        await conductor.report("a", Delta(spent={"ada": (1, 5)}))
        assert await conductor.report("b", Delta(spent={"ada": (7, 0)})) == {"ada": (3, 35)}
        assert await conductor.report("b", Delta()) == {}
        assert await conductor.report("a", Delta()) == {"ada": (7, 0)}
        assert await conductor.report("c", Delta()) == {"ada": (10, 35)}, "a replica that comes later"
        conductor._clock.cancel()

    asyncio.run(scenario())


def test_a_new_replica_learns_of_the_last_minute_and_one_that_is_gone_is_forgotten() -> None:
    ledger = Ledger()
    ledger.exchange("a", {"ada": (1, 100)}, 0.0)
    for second in range(10, 131, 10):
        ledger.exchange("a", {"ada": (1, 5)}, float(second))
    assert ledger.exchange("b", {}, 130.0) == {"ada": (7, 35)}, "of 70 to 130 s"
    ledger.exchange("a", {"ada": (1, 0)}, 180.0)
    assert ledger.exchange("b", {}, 185.0) == {"ada": (1, 0)}
    assert ledger.exchange("c", {}, 260.0) == {}
    assert set(ledger._untold) == {"c"}
