"""What an answer counts for, and the work for a client, which ends where the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from serving.answer import Answer, Target, unless_gone
from serving.counts import Counts
from serving.errors import ApiError
from serving.limits import CHAT
from serving.quota import Quota
from serving.spec import ServingSpec
from serving.upstream import Replies


class Client:
    """Leaves when told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def _work(ended: list[str]) -> str:
    try:
        await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    return "done"


def test_the_work_of_a_client_that_stays_is_done() -> None:
    async def play() -> None:
        assert await unless_gone(Client().receive, _work([])) == "done"
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody watches any more"

    asyncio.run(play())


def test_the_work_of_a_client_that_leaves_ends_and_whoever_did_it_goes_on() -> None:
    async def play() -> None:
        client, ended = Client(), []
        asyncio.get_running_loop().call_later(0.02, client.leaves.set)
        assert await unless_gone(client.receive, _work(ended)) is None
        assert ended == ["cancelled"]
        await asyncio.sleep(0)  # not cancelled itself

    asyncio.run(play())


@pytest.mark.parametrize("leaves", [False, True])
def test_whoever_cancels_all_of_it_does(leaves: bool) -> None:
    async def play() -> None:
        client, ended = Client(), []
        task = asyncio.create_task(unless_gone(client.receive, _work(ended)))
        await asyncio.sleep(0.02)
        if leaves:
            client.leaves.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["cancelled"]

    asyncio.run(play())


class Elsewhere(Replies):
    """Replicas are an endpoint on this machine, for what is counted does not depend on who answers."""

    url = ""

    @asynccontextmanager
    async def from_version(self, model, version, path, payload, wait_s, *_: Any, taken: Any = None, **__: Any):  # type: ignore[override]
        async with self.from_endpoint(self.url, path, payload, None, wait_s) as reply:
            if taken:
                taken(True)
            yield reply


Handler = Callable[[web.Request], Any]


def answered(handler: Handler, play: Callable[[Elsewhere], Any]) -> Any:
    async def run() -> Any:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        replies = Elsewhere()
        replies.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            return await play(replies)
        finally:
            await replies.close()
            await runner.cleanup()

    return asyncio.run(run())


def made(counted: list[Counts], quota: Quota | None = None, **body: Any) -> Answer:
    spec = ServingSpec.model_validate({"ingress": {"limits": {"timeout_s": 1.0}}})
    body = {"model": "tickets", "messages": [], "response_format": {"type": "json_object"}} | body
    target = Target("tickets", "v1", "canary")
    return Answer(body, CHAT, target, spec, quota, lambda _, __, counts, *___: counted.append(counts))


async def _sent(answer: Answer, replies: Replies) -> None:
    """As uvicorn would have it sent, to a client that stays."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    await (await answer.begin(replies))({"type": "http"}, receive, send)


def choice(text: Any, ends: str, at: str | None = None) -> Handler:
    """Whole or as a stream, as it is asked for; ended at a word that was asked for."""

    async def handler(request: web.Request) -> web.StreamResponse:
        usage = {"prompt_tokens": 1, "completion_tokens": 5}
        if not (await request.json()).get("stream"):
            message = {"index": 0, "message": {"content": text}, "finish_reason": ends, "stop_reason": at}
            return web.json_response({"id": "one", "choices": [message], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        last = {"index": 0, "delta": {}, "finish_reason": ends, "stop_reason": at}
        events = [{"index": 0, "delta": {"content": text}}, last]
        for event in events:
            await response.write(b"data: %b\n\n" % json.dumps({"id": "one", "choices": [event]}).encode())
        await response.write(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps({"choices": [], "usage": usage}).encode())
        return response

    return handler


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "ends", "at", "asked", "invalid"),
    [
        ('{"a": 1}', "stop", None, {}, 0),
        ("sorry", "stop", None, {}, 1),
        # by the room that its prompt left, or by what completions have without a word
        ('{"a": ', "length", None, {}, 0),
        ('{"a": ', "length", None, {"max_tokens": 5}, 0),
        ("sorry", "stop", None, {"max_tokens": 5}, 1),
        ('{"a": ', "stop", "1", {"stop": ["1"]}, 0),
        ("sorry", "stop", None, {"stop": ["1"]}, 1),
        ("x", "stop", None, {"logit_bias": {"5": 100}}, 0),
        ("", "stop", None, {"add_generation_prompt": False}, 0),
    ],
)
def test_what_a_request_cut_off_itself_is_not_held_against_a_canary(
    text: str, ends: str, at: str | None, asked: dict[str, Any], invalid: int, streamed: bool
) -> None:
    counted: list[Counts] = []

    async def play(replies: Elsewhere) -> None:
        await _sent(made(counted, stream=streamed, **asked), replies)

    answered(choice(text, ends, at), play)
    found = [(one.requests, one.errors, one.invalid, one.cut) for one in counted]
    assert found == [(1, 0, invalid, int(ends == "length"))], "and a person is told of those that have no end"


def test_an_answer_of_another_shape_is_passed_on() -> None:
    counted: list[Counts] = []

    async def play(replies: Elsewhere) -> Any:
        return await made(counted).begin(replies)

    response = answered(choice([{"type": "text", "text": "{}"}], "stop"), play)
    assert (response.status_code, len(counted)) == (200, 1)


async def _half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(status=502, headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b"{")
    if "stalls" in (await request.json()):
        await asyncio.sleep(5)
    assert request.transport is not None
    request.transport.abort()
    return response


def test_a_refusal_that_does_not_end_is_not_waited_for() -> None:
    counted: list[Counts] = []

    async def play(replies: Elsewhere) -> None:
        with pytest.raises(ApiError, match="went away") as caught:
            await made(counted).begin(replies)
        assert (caught.value.status, [one.errors for one in counted]) == (503, [1])
        with pytest.raises(TimeoutError):
            await made(counted, stalls=1).begin(replies)

    answered(_half, play)


async def _many(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(200):
        await response.write(b'data: {"choices": []}\n\n')
        await asyncio.sleep(0.005)
    return response


async def _done(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n')
    return response


async def _slowly(replies: Elsewhere, answer: Answer, at: int, never: bool = False) -> list[Any]:
    """What was sent to a client that takes longer than the answer may for its message ``at``."""
    response, sent = await answer.begin(replies), []

    async def receive() -> dict[str, Any]:
        while len(sent) <= at:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1 if never else 1.4)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == at + 1:
            await asyncio.sleep(30 if never else 1.1)

    await response({"type": "http"}, receive, send)
    return sent


@pytest.mark.parametrize("at", [0, 1], ids=["head", "body"])
def test_a_client_that_does_not_read_is_charged_and_says_nothing_of_the_variant(at: int) -> None:
    counted: list[Counts] = []
    quota = Quota.of(None, 10_000, 0.0)

    async def play(replies: Elsewhere) -> None:
        await _slowly(replies, made(counted, quota, stream=True, max_tokens=77), at, never=not at)

    answered(_many, play)
    assert counted == []
    assert quota.spent_since()[1] == 77


def test_whoever_reads_the_last_words_slowly_has_them_all_the_same() -> None:
    counted: list[Counts] = []
    sent = answered(_done, lambda replies: _slowly(replies, made(counted, stream=True), 1))
    assert b"".join(message.get("body", b"") for message in sent) == b"data: [DONE]\n\n"
    assert [(one.requests, one.errors, one.completion_tokens) for one in counted] == [(1, 0, 3)]
