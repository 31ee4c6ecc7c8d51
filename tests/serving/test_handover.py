"""A client's connection lent to whoever answers: real sockets, in both event loops that Serve may run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import uvloop
from conftest import until
from starlette.responses import JSONResponse, StreamingResponse

from serving import handover, listener
from serving.events import Told
from serving.handover import NO_LEASE, Begun, Broken, Desk, Gone, Lending, Line
from serving.listener import CLIENT, Listener

TOKEN = "token"
LENDING = Lending(left_s=10, show_usage=False, keep=True)
USAGE = {"prompt_tokens": 3, "completion_tokens": 5}


class Replica:
    """An application in the place of vLLM's: it does what the request says."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.begun = asyncio.Event()
        self.held = 0
        self.desk = Desk(self.application, self.opened)

    @asynccontextmanager
    async def opened(self, token: str) -> AsyncIterator[bool]:
        self.held += 1
        try:
            yield token == TOKEN
        finally:
            self.held -= 1

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        if scope["path"] == "/refused":
            response: Any = JSONResponse({"error": {"message": "no"}}, 400)
        else:
            response = StreamingResponse(self.events(**asked), media_type="text/event-stream")
        await response(scope, receive, send)

    async def events(self, words: int, pause_s: float = 0, size: int = 1, fails: int = -1, **_: Any) -> Any:
        self.begun.set()
        try:
            for number in range(words):
                await asyncio.sleep(pause_s)
                if number == fails:
                    raise RuntimeError("as a defect of vLLM would")
                yield _event(choices=[{"index": 0, "delta": {"content": f"{number} " * size}}])
            yield _event(choices=[], usage=USAGE)
            yield "data: [DONE]\n\n"
            self.ended.append("done")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


def _event(**content: Any) -> str:
    return f"data: {json.dumps({'id': 'one', **content}, separators=(',', ':'))}\n\n"


class Front:
    """An ingress in small: lends its client to the replica, and says what that came to."""

    def __init__(self, desk: str) -> None:
        self.line = Line.to(desk)
        self.told: list[Told | str] = []
        self.listener = Listener(self.application, "127.0.0.1", 0)

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message["more_body"]:
                break
        lending = Lending(**{**vars(LENDING), **json.loads(body).get("lending", {})})
        begun = await self.line.ask(TOKEN, scope["path"], body, lending)
        assert begun.status == 200
        await StreamingResponse(self.rest(begun, scope[CLIENT]), media_type="text/event-stream")(scope, receive, send)

    async def rest(self, begun: Begun, client: Any) -> AsyncIterator[bytes]:
        try:
            self.told.append(await begun.lend(client))
        except Broken:
            self.told.append("broken")
            yield b"data: broken\n\n"
        except asyncio.CancelledError:
            self.told.append("left")
            self.line.close()
            raise


Play = Callable[[Replica, Front, aiohttp.ClientSession], Awaitable[None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def scenario(request, monkeypatch: pytest.MonkeyPatch) -> Callable[[Play], None]:
    monkeypatch.setattr(listener, "_LAST_ANSWERS_S", 0.0)
    monkeypatch.setattr(listener, "_LAST_REQUESTS_S", 0.0)

    async def run(play: Play) -> None:
        replica = Replica()
        front = Front(replica.desk.address)
        async with aiohttp.ClientSession(front.listener.url) as session:
            await play(replica, front, session)
        front.line.close()
        replica.desk.close()
        await front.listener.close()

    def start(play: Play) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(run(play))

    return start


async def ask(session: aiohttp.ClientSession, **asked: Any) -> str:
    async with session.post("/answer", json=asked) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        return await reply.text()


def test_events_come_whole_and_the_connection_stays_for_the_next_request(scenario) -> None:
    async def play(replica, front, session) -> None:
        for words in (1, 5, 0):
            text = await ask(session, words=words)
            events = [line.removeprefix("data: ") for line in text.split("\n\n")[:-1]]
            assert events[-1] == "[DONE]"
            said = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1])
            assert said == "".join(f"{number} " for number in range(words))
            told = front.told[-1]
            assert (told.id, told.usage, told.done, told.failed, told.late) == ("one", USAGE, True, "", False)
            assert told.texts == ([said] if words else [])
        assert replica.ended == ["done"] * 3
        assert len(session.connector._conns) == 1, "one connection for all of them"

    scenario(play)


def test_the_token_counts_are_shown_to_whoever_asked_for_them(scenario) -> None:
    async def play(replica, front, session) -> None:
        assert '"usage"' in await ask(session, words=1, lending={"show_usage": True})
        assert '"usage"' not in await ask(session, words=1)

    scenario(play)


def test_whoever_reads_slowly_gets_all_of_it(scenario) -> None:
    async def play(replica, front, session) -> None:
        async with session.post("/answer", json={"words": 40, "size": 100_000}) as reply:
            await asyncio.sleep(0.3)
            assert replica.ended == [], "it waits for its reader"
            text = await reply.text()
        assert sum(text.count(f"{number} " * 100_000) for number in (10, 39)) == 2
        assert text.endswith("data: [DONE]\n\n")

    scenario(play)


@pytest.mark.parametrize("late", [False, True])
def test_whoever_reads_nothing_is_waited_for_a_while(scenario, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    monkeypatch.setattr(handover, "STALLED_S", 30 if late else 0.3)

    async def play(replica, front, session) -> None:
        limit = {"lending": {"left_s": 3 if late else 30}}  # long enough for all buffers to be full
        async with session.post("/answer", json={"words": 400, "size": 300_000} | limit) as reply:
            await until(lambda: front.told and not replica.held, 30)
            reply.close()
        assert "done" not in replica.ended
        told = front.told[-1]
        assert (told.done, told.late, told.torn) == (False, late, True), "nothing can follow half of a chunk"

    scenario(play)


def test_a_request_may_be_long(scenario) -> None:
    async def play(replica, front, session) -> None:
        assert "[DONE]" in await ask(session, words=1, padding="x" * 3_000_000)

    scenario(play)


def test_a_client_that_leaves_ends_the_answer(scenario) -> None:
    async def play(replica, front, session) -> None:
        async with session.post("/answer", json={"words": 10_000, "pause_s": 0.01}) as reply:
            await reply.content.readany()
            assert replica.held == 1
            reply.close()
        await until(lambda: front.told and not replica.held)
        assert (front.told, replica.ended, replica.held) == (["left"], ["cancelled"], 0)

    scenario(play)


def test_a_replica_that_goes_away_leaves_the_last_word_to_the_ingress(scenario) -> None:
    async def play(replica, front, session) -> None:
        async with session.post("/answer", json={"words": 10_000, "pause_s": 0.01}) as reply:
            await reply.content.readany()
            (serving,) = replica.desk._tasks
            serving.cancel()
            assert (await reply.text()).endswith("data: broken\n\n")
        assert front.told == ["broken"]
        with pytest.raises(Gone):
            await front.line.ask(TOKEN, "/answer", b"{}", LENDING)

    scenario(play)


def test_an_answer_ends_with_its_time(scenario) -> None:
    async def play(replica, front, session) -> None:
        await ask(session, words=10_000, pause_s=0.01, lending={"left_s": 0.2})
        assert (front.told[0].done, front.told[0].late) == (False, True)
        assert "[DONE]" in await ask(session, words=1), "the line is there for the next one"

    scenario(play)


def test_an_application_that_fails_is_an_answer_that_is_not_done(scenario) -> None:
    async def play(replica, front, session) -> None:
        assert "0 " in await ask(session, words=3, fails=1)
        assert (front.told[0].done, front.told[0].late) == (False, False)
        assert await ask(session, words=3, fails=0) == "", "it wrote nothing to what was lent"
        assert "[DONE]" in await ask(session, words=1), "the line is there for the next one"

    scenario(play)


def test_the_answer_begins_before_its_client_is_lent(scenario) -> None:
    async def play(replica, front, session) -> None:
        begun = await front.line.ask(TOKEN, "/answer", b'{"words": 1}', LENDING)
        await asyncio.wait_for(replica.begun.wait(), 5)
        assert (begun.status, begun.ended) == (200, False)

    scenario(play)


def test_a_refusal_is_handed_back_and_a_lease_is_needed(scenario) -> None:
    async def play(replica, front, session) -> None:
        refused = await front.line.ask(TOKEN, "/refused", b"{}", LENDING)
        assert (refused.status, json.loads(await refused.read()), refused.ended) == (
            400,
            {"error": {"message": "no"}},
            True,
        )
        assert (await front.line.ask("guessed", "/answer", b"{}", LENDING)).status == NO_LEASE
        assert replica.held == 0

    scenario(play)


def test_nobody_listens_on_another_machine() -> None:
    assert Line.to("winnow-elsewhere") is None
