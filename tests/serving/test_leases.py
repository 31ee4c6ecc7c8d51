"""Places in a replica: opened by their token, one request at a time, kept for the next one, and let go.

The two ends are the real ones, over real HTTP; in the middle a few lines stand for Serve, which hands a call on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop
from conftest import until

from serving import leases, listener, spec, upstream
from serving.leases import HEADER, NO_LEASE, Leases
from serving.upstream import Left, Overloaded, Replies


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers after as many seconds as the path says."""
    await asyncio.sleep(float(scope["path"].strip("/")))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Handle:
    """Serve's handle to one replica: counts its calls, and cancels as Serve does."""

    def __init__(self, replica: Leases) -> None:
        self.replica, self.calls = replica, 0

    def remote(self) -> Any:
        self.calls += 1
        return Call(self.replica.take())


class Call:
    def __init__(self, places: AsyncIterator[tuple[str, str]]) -> None:
        self._places = places
        self._held: asyncio.Task | None = None

    async def __anext__(self) -> tuple[str, str]:
        first = await anext(self._places)

        async def hold() -> None:
            async for _ in self._places:
                pass

        self._held = asyncio.create_task(hold())
        return first

    def cancel(self) -> None:
        if self._held:
            self._held.cancel()


def scenario(monkeypatch: pytest.MonkeyPatch, play: Callable[[Leases, Handle, Replies], Awaitable[None]]) -> None:
    monkeypatch.setattr(leases, "IDLE_S", 0.8)
    monkeypatch.setattr(upstream, "_KEPT_S", 0.1)
    monkeypatch.setattr(listener, "_LAST_ANSWERS_S", 0.0)  # no client is connected any more
    monkeypatch.setattr(listener, "_LAST_REQUESTS_S", 0.0)

    async def run() -> None:
        replica = Leases(application, "127.0.0.1", _well)
        handle = Handle(replica)
        replies = Replies(_handles={("tickets", "v1"): handle})
        try:
            await play(replica, handle, replies)
        finally:
            await replies.close()
            await replica.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in Ray's workers
        runner.run(run())


async def ask(replies: Replies, seconds: float = 0.0, wait_s: float = 5) -> bytes:
    async with replies.from_version("tickets", "v1", f"/{seconds}", b"{}", wait_s) as reply:
        assert reply.status == 200
        return await reply.read()


def test_one_lease_serves_one_request_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        for _ in range(20):
            assert await ask(replies) == b"ok"
        assert handle.calls == 1
        await asyncio.gather(*(ask(replies, 0.05) for _ in range(5)))
        assert handle.calls == 5, "as many places as requests at once"
        await until(lambda: replica._held == {})  # nobody asked any more
        await ask(replies)
        assert handle.calls == 6

    scenario(monkeypatch, play)


def test_a_port_opens_by_a_lease_alone_and_for_one_request_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        place = await replies._lease("tickets", "v1")
        assert place is not None

        async def status(token: str, seconds: float = 0) -> int:
            reply = await replies._send(f"{place.address}/{seconds}", b"{}", {HEADER: token})
            async with reply:
                return reply.status

        assert await status("guessed") == NO_LEASE
        assert await status("") == NO_LEASE
        assert sorted(await asyncio.gather(status(place.token, 0.1), status(place.token))) == [200, NO_LEASE]
        assert await status(place.token) == 200
        await until(lambda: replica._held == {})  # it was not used for too long
        assert await status(place.token) == NO_LEASE

    scenario(monkeypatch, play)


def test_a_place_that_nobody_takes_is_let_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        monkeypatch.setattr(leases, "IDLE_S", 60)
        for _ in range(10):
            assert await ask(replies) == b"ok"
            await until(lambda: replica._held == {})

    scenario(monkeypatch, play)


def test_serve_chooses_anew_now_and_then_beside_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        monkeypatch.setattr(leases, "IDLE_S", 60)
        monkeypatch.setattr(upstream, "_KEPT_S", 0.5)
        monkeypatch.setattr(upstream, "_GOOD_S", (0.1, 0.1))
        monkeypatch.setattr(upstream, "_SOON_S", 0.0)
        tokens = set[str]()
        async with asyncio.timeout(10):
            while handle.calls < 4:
                await ask(replies, 0.01)
                tokens |= {place.token for place in replies._free["tickets", "v1"]}
            assert len(tokens) == 1, "Serve chose the same replica, and the place in it is the same"

            handle.replica = other = Leases(application, "127.0.0.1", _well)
            while replica._held or not other._held:  # requests go where Serve would send them now
                await ask(replies, 0.01)
        await until(lambda: other._held == {})
        await other.close()

    scenario(monkeypatch, play)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_place_that_serve_does_not_give_again_is_left_with_its_request(
    monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    async def play(replica, handle, replies) -> None:
        monkeypatch.setattr(upstream, "_GOOD_S", (0.1, 0.1))
        monkeypatch.setattr(upstream, "_SOON_S", 0.0)
        monkeypatch.setattr(upstream, "_ANSWER_S", 60 if leaves else 0.1)
        await ask(replies, 0.11)
        served, handle.remote = handle.remote, lambda: Call(_full())
        waiting = replies._waiting["tickets", "v1"]
        used_on = asyncio.create_task(ask(replies, 1.5))
        await until(lambda: len(waiting) == 1)
        if leaves:
            replies.keep_to("tickets", ("v2",))
        await until(lambda: not waiting)
        assert not used_on.done(), "nobody waits in Serve for what is not needed yet"
        assert await used_on == b"ok", "its time is over, and it is there"
        assert replies._free["tickets", "v1"] == []
        await until(lambda: replica._held == {})
        handle.remote = served
        assert await ask(replies) == b"ok"

    scenario(monkeypatch, play)


def test_after_a_long_answer_serve_chooses_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        monkeypatch.setattr(upstream, "_GOOD_S", (0.05, 0.05))
        monkeypatch.setattr(upstream, "_LONG_S", 0.05)
        await ask(replies, 0.15)
        (token,) = replica._held
        await ask(replies)  # a replica that is to end answers no second one of that length
        assert handle.calls == 2
        assert token not in replica._held

    scenario(monkeypatch, play)


def test_a_replica_that_ends_has_time_for_what_its_leases_last_begin() -> None:
    assert max(upstream._GOOD_S) + upstream._LONG_S < spec._ENDS_S


def test_a_long_answer_keeps_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        assert await ask(replies, 1.0) == b"ok"
        assert await ask(replies) == b"ok"
        assert handle.calls == 1

    scenario(monkeypatch, play)


def test_whoever_gives_up_frees_the_place_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        with pytest.raises(TimeoutError):
            await ask(replies, 1, wait_s=0.1)
        asking = asyncio.create_task(ask(replies, 1))
        await until(lambda: len(replica._held) == 1)
        asking.cancel()
        await until(lambda: replica._held == {}, 0.3)  # and not when it would have been done

    scenario(monkeypatch, play)


def test_whoever_waits_for_a_version_that_leaves_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead() -> None:
        raise RuntimeError("no engine: whoever wants a place waits")

    async def play(replica, handle, replies) -> None:
        replica._check = dead
        waiting = [asyncio.create_task(ask(replies)) for _ in range(3)]
        await asyncio.sleep(0.05)
        replies.keep_to("tickets", ("v1", "v2"))
        replies.keep_to("another", ("v2",))
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in waiting)
        waiting[0].cancel()
        replies.keep_to("tickets", ("v2",))
        for one, told in zip(waiting, (asyncio.CancelledError, Left, Left), strict=True):
            with pytest.raises(told):
                await one
        assert not replies._waiting["tickets", "v1"]

    scenario(monkeypatch, play)


def test_a_kept_place_in_a_replica_that_is_gone_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        await ask(replies)
        (token,) = replica._held
        replica._held.clear()  # as in the replica that took its place
        assert await ask(replies) == b"ok"
        assert handle.calls == 2
        assert token not in replica._held
        gone = await replies._lease("tickets", "v1")
        assert gone is not None
        gone.address = "http://127.0.0.1:9"
        replies._keep("tickets", "v1", gone)
        assert await ask(replies) == b"ok"
        handle.remote = lambda: Call(_nothing())  # no replica is left
        replies._free.clear()
        monkeypatch.setattr(upstream, "_PAUSE_S", 0.01)
        with pytest.raises(Overloaded, match="can be reached"):
            await ask(replies)

    scenario(monkeypatch, play)


def test_a_replica_whose_engine_died_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(replica, handle, replies) -> None:
        await ask(replies)
        other = Leases(application, "127.0.0.1", _well)

        async def dead() -> None:
            raise RuntimeError("the engine is dead")

        replica._check = dead
        asking = asyncio.create_task(ask(replies))
        await asyncio.sleep(0.1)
        assert not asking.done(), "it waits for another replica"
        asking.cancel()
        handle.replica = other
        assert await ask(replies) == b"ok"
        await other.close()

    scenario(monkeypatch, play)


async def _well() -> None:
    """The engine's health, when it is."""


async def _full() -> AsyncIterator[tuple[str, str]]:
    """As many use the replica as may, and whoever wants a place waits."""
    await asyncio.Event().wait()
    yield "", ""


async def _nothing() -> AsyncIterator[tuple[str, str]]:
    return
    yield
