"""One request that generates, from the choice of who answers it to its last byte."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import aiohttp
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving import events, limits, place
from serving.counts import Counts
from serving.errors import ApiError
from serving.handover import STALLED_S, Begun, Broken, Lending
from serving.listener import CONNECTION
from serving.quota import Quota
from serving.samples import Sampler
from serving.spec import ServingSpec
from serving.upstream import Overloaded, Replies, Reply, pieces

FALLBACK = "fallback"
_LAST_WORD_S, _AT_THE_END_S = 1.0, 0.05
_OF_THE_REQUEST = (400, 413, 422)
"""Statuses that say something of the request, whoever sent it."""
_STEERS = (
    "allowed_token_ids",
    "bad_words",
    "continue_final_message",
    "echo",
    "ignore_eos",
    "logit_bias",
    "min_tokens",
    "structured_outputs",
)
"""By what a request has its answer end, or read, otherwise than the model would: nothing is held against that then."""
_STUCK = "Internal server error"
"""What vLLM says (``GenerationError``) when an answer can't go on; an engine that died is told in other words."""
_NO_TEXT = ApiError(400, "no text has the form that is asked for: its schema or grammar never ends", "unmet_format")
T = TypeVar("T")
VERSION_HEADER, VARIANT_HEADER, FALLBACK_HEADER = "x-winnow-version", "x-winnow-variant", "x-winnow-fallback"


Count = Callable[["Target", str | None, Counts, float | None, float], None]
"""Takes whose answer it was, its id, what it counts for, and the seconds to its first event and to its end."""


class Target(NamedTuple):
    """Who answers one request, and what the client and the counts call it."""

    model: str
    version: str
    variant: str


class _Unread(Exception):
    """The time of a stream went by while its client did not read what there was."""


class Answer:
    """Made for one request, and used once.

    Args:
        client: the transport of the client's connection, where that can be lent to a replica.
    """

    def __init__(
        self,
        body: dict[str, Any],
        path: str,
        target: Target,
        spec: ServingSpec,
        quota: Quota | None,
        count: Count,
        sampler: Sampler | None = None,
        client: asyncio.Transport | None = None,
    ) -> None:
        self._body, self._path, self._target, self._spec, self._quota = body, path, target, spec, quota
        self._count = count
        self._sampler = sampler if sampler and sampler.wants() else None
        self._streamed, self._client = body.get("stream") is True, client
        self._placed = self._begun = False
        self._started = time.monotonic()
        self._headers: dict[str, str] = {}
        form = body.get("response_format")
        wanted = isinstance(form, dict) and form.get("type") in ("json_object", "json_schema")
        self._wants_json = (spec.ingress.json_answers or wanted) and not body.get("tools")  # a call is no text

    @property
    def _left_s(self) -> float:
        return max(0.0, self._spec.ingress.limits.timeout_s - (time.monotonic() - self._started))

    async def begin(self, replies: Replies) -> Response:
        """The response: whole, or a stream that has begun.

        Raises:
            ApiError: nobody can answer it.
            TimeoutError: nobody did in time.
        """
        stack = AsyncExitStack()
        try:
            with self._charged():
                reply = await self._ask(stack, replies)
            if reply.status != 200:
                return await self._refused(reply)
            if self._streamed:
                moved = stack.pop_all()
                parts = self._lent(moved, reply) if isinstance(reply, Begun) else self._passed_on(moved, reply)
                response = _Stream(parts, media_type="text/event-stream", headers=self._all_headers())
                response.ended = lambda: self._sent(moved)
                return response
            assert not isinstance(reply, Begun), "no stream"
            with self._charged():
                return await self._whole(reply)
        finally:
            await stack.aclose()

    @contextmanager
    def _charged(self) -> Iterator[None]:
        """A client that leaves, or is told that it took too long, once it has a place and before it is told what it
        used, has used all that it might, or it had no limit."""
        try:
            yield
        except (asyncio.CancelledError, TimeoutError):
            if self._placed:
                self._charge()
            raise

    def _has_place(self, has: bool = True) -> None:
        self._placed = has

    def _charge(self) -> None:
        if self._quota:
            self._quota.spend(limits.most_tokens(self._body, self._path, self._spec.ingress.limits))

    async def _ask(self, stack: AsyncExitStack, replies: Replies) -> Reply:
        """Whoever answers: the version that was chosen, or where that cannot, the fallback."""
        fallback, target = self._spec.fallback, self._target
        place_s = None if fallback is None else fallback.after_s
        lending = Lending(self._left_s, *self._looks()) if self._streamed and self._client else None
        payload, path = self._payload(target.model), self._path
        own = replies.from_version(
            target.model, target.version, path, payload, self._left_s, lending, place_s, self._has_place
        )
        try:
            return await stack.enter_async_context(own)
        except (Overloaded, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            if fallback is None:
                raise self.failed(error) if isinstance(error, ApiError) else error from None
            self.failed(None)
            self._has_place(False)
            self._headers[FALLBACK_HEADER] = "timeout" if late else "overload"
        name = fallback.model or fallback.endpoint_model or ""
        self._target = Target(name, f"{FALLBACK}:{name}", FALLBACK)
        other: AbstractAsyncContextManager[Reply]
        try:
            if fallback.base_url:
                self._has_place()
                key = os.environ.get(fallback.api_key_env) if fallback.api_key_env else None
                other = replies.from_endpoint(fallback.base_url, path, self._payload(name), key, self._left_s)
            else:
                version = _production(name)
                payload = self._payload(name)
                other = replies.from_version(name, version, path, payload, self._left_s, taken=self._has_place)
            return await stack.enter_async_context(other)
        except ApiError as error:
            raise self.failed(error) from None

    def _looks(self) -> tuple[bool, bool]:
        """Of ``events.Stream``: what the client wants to see, and whether we read what it says."""
        options = self._body.get("stream_options")
        wanted = isinstance(options, dict) and options.get("include_usage") is True
        return wanted, self._wants_json or self._sampler is not None

    def _payload(self, model: str) -> bytes:
        body = self._body | {"model": model}
        if self._streamed:  # its token counts, which the client may not have asked for
            options = body.get("stream_options")
            body["stream_options"] = (options if isinstance(options, dict) else {}) | {"include_usage": True}
        return json.dumps(body).encode()

    def _all_headers(self) -> dict[str, str]:
        return self._headers | {VERSION_HEADER: self._target.version, VARIANT_HEADER: self._target.variant}

    async def _refused(self, reply: Reply) -> Response:
        """vLLM's own error, which has OpenAI's shape already; or whatever else answered, in that shape.

        Raises:
            ApiError: a fallback refuses us, not the client's request: our key, our name of its model, its own load.
            TimeoutError: it does not end in time.
        """
        try:
            async with asyncio.timeout(self._left_s):
                raw = await reply.read()
        except aiohttp.ClientError:
            raise self.failed(went_away()) from None
        if self._target.variant == FALLBACK and reply.status not in _OF_THE_REQUEST:
            raise self.failed(Overloaded(f"the fallback answers {reply.status}"))
        status = reply.status
        try:
            content = json.loads(raw)
        except ValueError:
            content = None
        told, _ = events.error_in(content) or ("", 0)
        if self._unmet(told):
            status, content = 400, _NO_TEXT.body
        elif not told:
            content = ApiError(status, "the model could not answer", "upstream_error").body
        self._note(None, Counts(requests=1, errors=int(status >= 500), rejected=int(status < 500)))
        return JSONResponse(content, status, headers=self._all_headers())

    def _unmet(self, told: str) -> bool:
        """Whether that error is the request's own doing: it wants a form that no text has, which vLLM notices when no
        token is left to choose, and calls a failure of its own."""
        return told == _STUCK and limits.holds_to_a_form(self._body)

    async def _whole(self, reply: aiohttp.ClientResponse) -> Response:
        try:
            async with asyncio.timeout(self._left_s):
                raw = await reply.read()
            answer = dict(json.loads(raw))
            texts, usage = events.texts(answer), dict(answer.get("usage") or {})
        except (aiohttp.ClientError, ValueError, TypeError, AttributeError):  # or it has another shape
            raise self.failed(went_away()) from None
        counts = self._answered(usage, events.is_empty(answer), texts, events.ends(answer))
        self._note(answer.get("id"), counts)
        self._keep(answer.get("id"), texts, counts)
        return Response(raw, media_type="application/json", headers=self._all_headers())

    async def _passed_on(self, stack: AsyncExitStack, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Events as they come. A stream that breaks ends with an error event; a client that goes away ends ours."""
        stream, first_at, late, self._begun = events.Stream(*self._looks()), None, False, True
        async with stack:
            try:
                async for piece in self._in_time(pieces(reply)):
                    if out := stream.feed(piece):
                        first_at = first_at or time.monotonic()
                        yield out
            except (Broken, TimeoutError) as error:
                late = isinstance(error, TimeoutError)
            except _Unread:
                self._left(told := stream.told(first_at))
                if not (told.done or told.failed):
                    yield too_late().event
                return
            except BaseException:  # the client left
                self._left(stream.told(first_at))
                raise
            if event := self._end_of_stream(stream.told(first_at, late)):
                yield event

    async def _in_time(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The limit ends what waits for a part, and not the client that is being given one.

        Raises:
            TimeoutError: the next one is not there in time.
            _Unread: no time was left when the client had taken the last one.
        """
        while True:
            async with asyncio.timeout(self._left_s):
                part = await anext(parts, None)
            if part is None:
                return
            yield part
            if not self._left_s:
                raise _Unread

    async def _lent(self, stack: AsyncExitStack, reply: Begun) -> AsyncIterator[bytes]:
        """What the replica does not write to the client itself: an error event, where its stream breaks."""
        assert self._client is not None, "lent"
        told, self._begun = events.Told(), True
        at_most_s = self._left_s + _LAST_WORD_S  # it keeps to the limit itself, if it lives
        async with stack:
            try:
                async with asyncio.timeout(at_most_s):
                    told = await reply.lend(self._client)
            except asyncio.CancelledError:  # the client left; at the end, perhaps, or at an error that it was told
                self._left(await reply.last_word(_AT_THE_END_S))
                raise
            except TimeoutError:
                told = events.Told(late=True)
            except Broken:
                pass
            if told.torn:  # it did not read, and nothing can follow
                self._client.abort()
            if told.torn or (self._client.is_closing() and not told.late):
                self._left(told)
                return
            if told.done and not told.failed:  # the client has its end before it is counted
                asyncio.get_running_loop().call_soon(self._end_of_stream, told)
            elif event := self._end_of_stream(told):
                yield event

    async def _sent(self, stack: AsyncExitStack) -> None:
        """A stream whose head its client did not take never began, and ends here, as if the client had left."""
        if not self._begun:
            self._charge()
            await stack.aclose()

    def _left(self, told: events.Told) -> None:
        """Of a stream whose client is gone: what it came to, if to anything; leaving says nothing of the variant."""
        if told.done or told.failed:
            self._end_of_stream(told)
        else:
            self._charge()

    def _end_of_stream(self, told: events.Told) -> bytes | None:
        """Count it; the event that has to end it where it is not done."""
        if told.failed or not told.done:
            mistaken = int(400 <= told.status < 500 or self._unmet(told.failed))  # of the client
            self._note(told.id, Counts(requests=1, errors=1 - mistaken, rejected=mistaken))
            if told.late:
                self._charge()
                return too_late().event
            return None if told.failed else went_away().event
        first_s = None if told.first_at is None else told.first_at - self._started
        said = "completion_tokens" in told.usage
        took = _number(told.usage, "completion_tokens")
        empty = said and took < 2 and not told.cut  # the last token ends the answer
        counts = self._answered(told.usage, empty, told.texts, (told.cut, told.stopped))
        if first_s is not None:
            counts.first_token.add(first_s)
        self._note(told.id, counts, first_s)
        self._keep(told.id, told.texts, counts)
        return None

    def _keep(self, identity: str | None, texts: list[str], counts: Counts) -> None:
        """As a sample, if it is to be one."""
        if self._sampler and texts:
            tokens = {"prompt_tokens": counts.prompt_tokens, "completion_tokens": counts.completion_tokens}
            about = self._target._asdict() | {"id": identity} | tokens
            self._sampler.take(self._body, texts, **about)

    def _answered(self, usage: dict[str, Any], empty: bool, texts: list[str], ends: tuple[bool, bool]) -> Counts:
        """What an answer counts for. One that is held to a form and ends with its first token is what was asked for:
        llguidance has an answer end whose grammar allows no text. So is one that the request itself cut off or steered:
        five of them would end an automatic canary.

        Args:
            ends: ``events.ends`` of it.
        """
        (cut, stopped), took = ends, _number(usage, "completion_tokens")
        unmet = empty and took <= (self._body.get("n") or 1) and limits.holds_to_a_form(self._body)
        steered = any(self._body.get(name) for name in _STEERS) or self._body.get("add_generation_prompt") is False
        as_asked = unmet or cut or stopped or steered
        bad_json = self._wants_json and not all(map(events.is_json, texts))
        counts = Counts(
            requests=1,
            rejected=int(unmet),
            cut=int(cut),
            invalid=int((empty or bad_json) and not as_asked),
            prompt_tokens=_number(usage, "prompt_tokens"),
            completion_tokens=took,
        )
        if not unmet:
            counts.latency.add(time.monotonic() - self._started)
        return counts

    def failed(self, error: ApiError | None) -> ApiError:
        """Count a failure of the server, and give it back to be raised."""
        self._note(None, Counts(requests=1, errors=1))
        return error or went_away()

    def _note(self, identity: str | None, counts: Counts, first_s: float | None = None) -> None:
        if self._quota:
            self._quota.spend(counts.prompt_tokens + counts.completion_tokens)
        self._count(self._target, identity, counts, first_s, time.monotonic() - self._started)


class _Stream(StreamingResponse):
    """Ends with its client, as starlette's does in a task group of anyio's, which takes longer than all else here."""

    ended: Callable[[], Awaitable[None]]
    """Called at the end, however that comes."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def unless_stalled(message: Any) -> None:
            try:
                async with asyncio.timeout(STALLED_S):
                    await send(message)
            except TimeoutError:
                if connection := scope.get(CONNECTION):
                    connection.abort()  # which tells ``receive``
                raise

        try:
            with suppress(TimeoutError):
                await unless_gone(receive, self.stream_response(unless_stalled))
        finally:
            await self.ended()


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T | None:
    """The work's outcome. Where the client goes away before, the work is cancelled, which frees its place in the
    engine, and there is none.

    Args:
        receive: of a request whose body has been read.
    """
    task, left = asyncio.current_task(), False
    assert task is not None, "a request has its task"

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = task.cancel()

    leaving = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not left or task.uncancel():
            raise
        return None
    finally:
        leaving.cancel()


def _number(usage: dict[str, Any], name: str) -> int:
    """As an endpoint that is not ours may not give it."""
    value = usage.get(name)
    return max(0, value) if isinstance(value, int) else 0


def _production(model: str) -> str:
    """
    Raises:
        Overloaded: it is not deployed.
    """
    if (now := place.deployed().get(model)) is None:
        raise Overloaded(f"the fallback {model} is not deployed")
    return place.production(model, now)


def too_late() -> ApiError:
    return ApiError(408, "the answer took too long", "timeout")


def went_away() -> ApiError:
    return ApiError(503, "the model went away while it answered; try again", "upstream_lost", retry_after_s=1)
