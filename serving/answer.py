"""One request that generates, from the choice of who answers it to its last byte."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import aiohttp
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving import events, place
from serving.counts import Counts
from serving.errors import ApiError
from serving.quota import Quota
from serving.samples import Sampler
from serving.spec import ServingSpec
from serving.upstream import Broken, Overloaded, Replies, pieces

FALLBACK = "fallback"
VERSION_HEADER, VARIANT_HEADER, FALLBACK_HEADER = "x-winnow-version", "x-winnow-variant", "x-winnow-fallback"


Count = Callable[["Target", str | None, Counts, float | None, float], None]
"""Takes whose answer it was, its id, what it counts for, and the seconds to its first event and to its end."""


class Target(NamedTuple):
    """Who answers one request, and what the client and the counts call it."""

    model: str
    version: str
    variant: str


class Answer:
    """Made for one request, and used once."""

    def __init__(
        self,
        body: dict[str, Any],
        target: Target,
        spec: ServingSpec,
        quota: Quota | None,
        count: Count,
        sampler: Sampler | None = None,
    ) -> None:
        self._body, self._target, self._spec, self._quota, self._count = body, target, spec, quota, count
        self._sampler = sampler if sampler and sampler.wants() else None
        self._streamed = body.get("stream") is True
        self._started = time.monotonic()
        self._headers: dict[str, str] = {}
        form = body.get("response_format")
        self._wants_json = spec.ingress.json_answers or (
            isinstance(form, dict) and form.get("type") in ("json_object", "json_schema")
        )

    @property
    def _left_s(self) -> float:
        return max(0.0, self._spec.ingress.limits.timeout_s - (time.monotonic() - self._started))

    async def begin(self, replies: Replies, path: str) -> Response:
        """The response: whole, or a stream that has begun.

        Raises:
            ApiError: nobody can answer it.
            TimeoutError: nobody did in time.
        """
        stack = AsyncExitStack()
        try:
            reply = await self._ask(stack, replies, path)
            if reply.status != 200:
                return await self._refused(reply)
            if self._streamed:
                moved = stack.pop_all()
                return StreamingResponse(
                    self._stream(moved, reply), media_type="text/event-stream", headers=self._all_headers()
                )
            return await self._whole(reply)
        finally:
            await stack.aclose()

    async def _ask(self, stack: AsyncExitStack, replies: Replies, path: str) -> aiohttp.ClientResponse:
        """Whoever answers: the version that was chosen, or where that cannot, the fallback."""
        fallback, target = self._spec.fallback, self._target
        wait_s = self._left_s if fallback is None else min(self._left_s, fallback.after_s)
        own = replies.from_version(target.model, target.version, path, self._payload(target.model), wait_s)
        try:
            return await stack.enter_async_context(own)
        except (Overloaded, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            if fallback is None:
                raise self.failed(error) if isinstance(error, ApiError) else error from None
            self.failed(None)
            self._headers[FALLBACK_HEADER] = "timeout" if late else "overload"
        name = fallback.model or fallback.endpoint_model or ""
        self._target = Target(name, f"{FALLBACK}:{name}", FALLBACK)
        try:
            if fallback.base_url:
                key = os.environ.get(fallback.api_key_env) if fallback.api_key_env else None
                other = replies.from_endpoint(fallback.base_url, path, self._payload(name), key, self._left_s)
            else:
                version = _production(name)
                other = replies.from_version(name, version, path, self._payload(name), self._left_s)
            return await stack.enter_async_context(other)
        except ApiError as error:
            raise self.failed(error) from None

    def _payload(self, model: str) -> bytes:
        body = self._body | {"model": model}
        if self._streamed:  # its token counts, which the client may not have asked for
            options = body.get("stream_options")
            body["stream_options"] = (options if isinstance(options, dict) else {}) | {"include_usage": True}
        return json.dumps(body).encode()

    def _all_headers(self) -> dict[str, str]:
        return self._headers | {VERSION_HEADER: self._target.version, VARIANT_HEADER: self._target.variant}

    async def _refused(self, reply: aiohttp.ClientResponse) -> Response:
        """vLLM's own error, which has OpenAI's shape already; or whatever else answered, in that shape."""
        raw = await reply.read()
        broken = reply.status >= 500
        self._note(None, Counts(requests=1, errors=int(broken), rejected=int(not broken)))
        try:
            content = json.loads(raw)
            assert isinstance(content["error"], dict), "OpenAI's shape"
        except (ValueError, KeyError, TypeError, AssertionError):
            content = ApiError(reply.status, "the model could not answer", "upstream_error").body
        return JSONResponse(content, reply.status, headers=self._all_headers())

    async def _whole(self, reply: aiohttp.ClientResponse) -> Response:
        try:
            async with asyncio.timeout(self._left_s):
                raw = await reply.read()
            answer = json.loads(raw)
        except (aiohttp.ClientError, ValueError):
            raise self.failed(went_away()) from None
        texts = events.texts(answer)
        counts = self._answered(answer.get("usage") or {}, bad=not all(texts) or self._bad_json(texts))
        self._note(answer.get("id"), counts)
        self._keep(answer.get("id"), texts, counts)
        return Response(raw, media_type="application/json", headers=self._all_headers())

    async def _stream(self, stack: AsyncExitStack, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Events as they come. A stream that breaks ends with an error event; a client that goes away ends ours."""
        options = self._body.get("stream_options")
        wanted = isinstance(options, dict) and options.get("include_usage") is True
        stream, first_s = events.Stream(wanted, self._wants_json or self._sampler is not None), None
        async with stack:
            try:
                async with asyncio.timeout(self._left_s):
                    async for piece in pieces(reply):
                        if out := stream.feed(piece):
                            first_s = first_s or time.monotonic() - self._started
                            yield out
            except (Broken, TimeoutError) as error:
                late = isinstance(error, TimeoutError)
                yield (too_late() if late else went_away()).event
                stream.failed = True
            else:
                if not stream.done:
                    yield went_away().event
                    stream.failed = True
            finally:
                self._end_of_stream(stream, first_s)

    def _end_of_stream(self, stream: events.Stream, first_s: float | None) -> None:
        if stream.failed:
            self._note(stream.id, Counts(requests=1, errors=1))
        elif stream.done:
            empty = stream.usage.get("completion_tokens", 2) < 2  # the last token ends the answer
            counts = self._answered(stream.usage, bad=empty or (self._wants_json and self._bad_json(stream.texts())))
            if first_s is not None:
                counts.first_token.add(first_s)
            self._note(stream.id, counts, first_s)
            if self._sampler:
                self._keep(stream.id, stream.texts(), counts)
        # neither: the client went away, and that says nothing of the variant

    def _keep(self, identity: str | None, texts: list[str], counts: Counts) -> None:
        """As a sample, if it is to be one."""
        if self._sampler and texts:
            tokens = {"prompt_tokens": counts.prompt_tokens, "completion_tokens": counts.completion_tokens}
            about = self._target._asdict() | {"id": identity} | tokens
            self._sampler.take(self._body, texts, **about)

    def _bad_json(self, texts: list[str]) -> bool:
        return self._wants_json and not all(map(events.is_json, texts))

    def _answered(self, usage: dict[str, Any], bad: bool) -> Counts:
        counts = Counts(
            requests=1,
            invalid=int(bad),
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
        )
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
