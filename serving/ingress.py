"""The HTTP front of one model: keys, limits, traffic, fallback, counts. What it lets through is answered by vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from starlette.requests import ClientDisconnect

from serving import keys, limits, place, registry
from serving.answer import Answer, Target, too_late, unless_gone, went_away
from serving.conductor import NAME as CONDUCTOR
from serving.conductor import Delta, add_spent
from serving.counts import Counts
from serving.errors import ApiError, failure
from serving.keys import ApiKey
from serving.limits import CHAT, COMPLETIONS
from serving.listener import CLIENT, Listener
from serving.meters import Meters
from serving.quota import Quota
from serving.samples import Sampler
from serving.spec import with_changes
from serving.traffic import NoSuchVersion, Routes
from serving.upstream import Left, Replies

SESSION_HEADER = "x-session-id"
_POLL_S, _REPORT_S = 0.2, 1.0
_log = logging.getLogger("ray.serve")
_GENERATING = CHAT, COMPLETIONS


class Ingress:
    """One replica of the front. Its aliases, canary and keys are files that it reads again five times a second, so a
    command that writes them has its effect in all replicas, and none of them has to be told."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        settings: dict[str, Any],
        listens: tuple[str, int] | None,
        loopback: bool,
        deployed: Any = None,
    ) -> None:
        self._model, self._spec, self._loopback = model, with_changes(settings, {}), loopback
        self._listens = listens
        self._listener: Listener | None = None
        self._warm: tuple[str, ...] = ()
        self._routes = Routes((), "", {})
        self._keys: list[ApiKey] = []
        self._quotas: dict[str, Quota] = {}
        application = serve.get_replica_context().app_name  # of ``serve run`` it need not be the model's name
        self._replies, self._delta, self._name = Replies({model: application}), Delta(), os.urandom(8).hex()
        self._meters = Meters()
        sampling = self._spec.ingress.sampling
        self._sampler = Sampler(model, sampling) if sampling else None
        self._conductor = serve.get_deployment_handle(CONDUCTOR, application)
        self._background = [asyncio.create_task(self._report())]

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve calls this with the versions that are warm, the newest deployed one first."""
        self._warm = tuple(config["warm"])
        self._read()
        self._replies.keep_to(self._model, self._warm)
        if len(self._background) == 1:
            self._background.append(asyncio.create_task(self._watch()))
        if self._listens and self._listener is None:  # not in __init__: there is no application then
            self._listener = Listener(self._application, *self._listens)

    async def __del__(self) -> None:
        """Serve's last word to a replica: answers that have begun are finished."""
        if self._listener:
            await self._listener.close()
        with suppress(TimeoutError):  # where all of the application ends, nobody may be there to be told
            async with asyncio.timeout(_REPORT_S):
                await self._tell()

    def _read(self) -> None:
        plan = registry.canary(self._model) or {"weight": 0}
        self._routes = Routes(self._warm, self._warm[0], registry.aliases(self._model), plan["weight"])
        self._keys = keys.read()

    async def _watch(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await asyncio.to_thread(self._read)
            except Exception as error:  # storage that is away for a moment, a newer file; what was read last holds
                if str(error) != told:
                    _log.warning("aliases or keys cannot be read: %s", error)
                told = str(error)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            try:
                await self._tell()
            except Exception:  # whatever somebody counted: keys and canaries need the next report
                _log.exception("what was counted cannot be told")

    async def _tell(self) -> None:
        """Hand what was counted to the conductor, and learn what the keys spent elsewhere. What it could not take goes
        with the next report."""
        self._meters.tell()
        delta, self._delta = self._delta, Delta()
        spent = {sha256: spent for sha256, quota in self._quotas.items() if any(spent := quota.spent_since())}
        add_spent(delta.spent, spent)
        try:
            elsewhere = await self._conductor.report.remote(self._name, delta)
        except Exception:  # it is being started anew, or overloaded; nothing here may end for that
            delta.merge(self._delta)
            self._delta = delta
            return
        there_are = {key.sha256: key for key in self._keys}
        for sha256, (requests, tokens) in elsewhere.items():
            if key := there_are.get(sha256):  # one that asked nothing here yet may have spent all of it elsewhere
                self._quota(key).take(requests, tokens)
        self._quotas = {sha256: quota for sha256, quota in self._quotas.items() if sha256 in there_are}

    async def check_health(self) -> None:
        """Serve starts a replica anew that has stopped to look at its files, or to tell what it counted."""
        for task in self._background:
            if task.done():
                task.result()

    # Routes ---------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions, streamed or whole, as vLLM takes them."""
        return await self._generate(request, CHAT)

    async def completions(self, request: Request) -> Response:
        """OpenAI's text completions."""
        return await self._generate(request, COMPLETIONS)

    async def tokenize(self, request: Request) -> Response:
        """A text's or a conversation's tokens."""
        return await self._plain(request, "/tokenize")

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        return await self._plain(request, "/detokenize")

    async def models(self, request: Request) -> Response:
        """The model, and beneath it the versions that can be asked for as ``NAME@VERSION``."""
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._card(self._model)]})

    async def model(self, request: Request, model: str) -> Response:
        """One of them."""
        self._admit(request)
        name, _, wanted = model.partition("@")
        self._choose(name, wanted, "")
        return JSONResponse(self._card(model))

    async def feedback(self, request: Request) -> Response:
        """``{"id": the answer's id, "score": from 0 to 1}``: it counts for the variant that gave the answer."""
        self._admit(request)
        body = limits.parse(await self._body(request))
        identity, score = body.get("id"), body.get("score")
        if not isinstance(identity, str) or isinstance(score, bool) or not isinstance(score, int | float):
            raise ApiError(400, "feedback takes an answer's id and a score from 0 to 1", "invalid_feedback")
        if not 0 <= score <= 1:
            raise ApiError(400, f"score must be from 0 to 1, but got {score}", "invalid_feedback", "score")
        await self._tell()
        for wait_s in (0, _REPORT_S, 2 * _REPORT_S):  # another replica may have given the answer, and be about to tell
            await asyncio.sleep(wait_s)
            if await self._conductor.feedback.remote(identity, float(score)):
                return JSONResponse({"id": identity, "score": score})
        raise ApiError(404, f"no answer {identity!r} is remembered", "unknown_answer", "id")

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "winnow", "versions": list(self._warm)}

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        """FastAPI's, but for the routes that nearly all requests take, on which it would take as long as we do."""
        path = scope["path"]
        if path not in _GENERATING or scope.get("method") != "POST" or self._spec.ingress.cors_origins:
            await self.app(scope, receive, send)  # type: ignore[attr-defined]  # Serve's wrapper has it
            return
        try:
            response = await self._generate(Request(scope, receive), path)
        except ApiError as error:
            response = error.response()
        except Exception:
            _log.exception("the ingress failed")
            response = failure().response()
        await response(scope, receive, send)

    # Who may ask, and what ------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> Quota | None:
        """Let a request in.

        Returns:
            What its key may ask for; None where no key is needed.

        Raises:
            ApiError: 401 without a key where one is needed; 429 where the key's limit is reached.
        """
        if not self._keys and self._loopback and _from_here(request) and self._of_a_page_here(request):
            return None
        scheme, _, plain = request.headers.get("authorization", "").partition(" ")
        key = keys.match(self._keys, plain.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        quota, now = self._quota(key), time.monotonic()
        if wait := quota.admit(now):
            raise ApiError(429, f"the limits of key {key.name!r} are reached", "rate_limit_exceeded", None, wait)
        return quota

    def _of_a_page_here(self, request: Request) -> bool:
        """Of no page in a browser, or of one that may: pages of others cannot read answers, but could ask all day."""
        origin, allowed = request.headers.get("origin"), self._spec.ingress.cors_origins
        return not origin or origin in allowed or "*" in allowed or place.is_loopback(_host_of(origin))

    def _quota(self, key: ApiKey) -> Quota:
        if key.sha256 not in self._quotas:  # not its name: a key made anew under an old one has limits of its own
            now = time.monotonic()
            self._quotas[key.sha256] = Quota.of(key.requests_per_minute, key.tokens_per_minute, now)
        return self._quotas[key.sha256]

    async def _body(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: 413 or 408, and no more of it is read.
        """
        allowed, parts, size = self._spec.ingress.limits, [], 0
        most, within_s = allowed.max_body_bytes, allowed.body_timeout_s
        try:
            async with asyncio.timeout(within_s):
                async for part in request.stream():
                    parts.append(part)
                    if (size := size + len(part)) > most:
                        raise ApiError(413, f"the body must be at most {most} bytes, but is longer", "body_too_large")
        except ClientDisconnect:
            raise ApiError(400, "the body ends in its middle", "body_cut_off") from None  # which nobody reads
        except TimeoutError:
            raise ApiError(408, f"the body must be here within {within_s:g} s, but is not", "body_too_slow") from None
        return b"".join(parts)

    async def _asked(self, request: Request) -> dict[str, Any]:
        body = limits.parse(await self._body(request))
        limits.check(body, self._spec.ingress.limits)
        return body

    def _target(self, request: Request, body: dict[str, Any]) -> Target:
        name, _, wanted = str(body.get("model") or "").partition("@")
        return self._choose(name, wanted, _key(request, body))

    def _choose(self, name: str, wanted: str, key: str) -> Target:
        """
        Raises:
            ApiError: 404, no such model here, or no such version.
        """
        if name != self._model:
            raise ApiError(
                404, f"there is no model {name!r} here; there is {self._model!r}", "model_not_found", "model"
            )
        try:
            version, variant = self._routes.choose(wanted, key)
        except NoSuchVersion:
            known = ", ".join(f"{self._model}@{version}" for version in self._warm)
            raise ApiError(
                404, f"{name}@{wanted} is not deployed; there are: {known}", "model_not_found", "model"
            ) from None
        return Target(self._model, version, variant)

    # Answers --------------------------------------------------------------------------------------------------------

    async def _plain(self, request: Request, path: str) -> Response:
        """A request that generates nothing: passed on, and not counted."""
        self._admit(request)
        body = await self._asked(request)
        target = self._target(request, body)
        payload, wait_s = json.dumps(body | {"model": target.model}).encode(), self._spec.ingress.limits.timeout_s

        async def answer() -> Response:
            async with (
                asyncio.timeout(wait_s),
                self._replies.from_version(target.model, target.version, path, payload, wait_s) as reply,
            ):
                return Response(await reply.read(), reply.status, media_type="application/json")

        try:
            return await unless_gone(request.receive, answer()) or _to_nobody()
        except TimeoutError:
            raise too_late() from None
        except (Left, aiohttp.ClientError):
            raise went_away() from None

    async def _generate(self, request: Request, path: str) -> Response:
        quota = self._admit(request)
        body, client = await self._asked(request), request.scope.get(CLIENT)
        while True:
            target = self._target(request, body)
            answer = Answer(body, path, target, self._spec, quota, self._count, self._sampler, client)
            try:
                return await unless_gone(request.receive, answer.begin(self._replies)) or _to_nobody()
            except Left:  # before it had a place for us: whoever took its place answers
                continue
            except TimeoutError:
                raise answer.failed(too_late()) from None

    def _count(
        self, target: Target, identity: str | None, counts: Counts, first_s: float | None, took_s: float
    ) -> None:
        self._delta.add(target.version, target.variant, identity, counts)
        self._meters.add(*target, counts, first_s, took_s)


def _to_nobody() -> Response:
    """For a client that has left."""
    return Response(status_code=499)


def _key(request: Request, body: dict[str, Any]) -> str:
    """By what a client keeps its variant: its session, its user, or nothing at all."""
    user = body.get("user")
    return request.headers.get(SESSION_HEADER) or (user if isinstance(user, str) else "") or str(random.random())


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _from_here(request: Request) -> bool:
    """From this machine, and by a loopback name: a page in a browser here that has its own name point to us is not.
    Serve's own proxy names no client, one that speaks HTTP to this replica does."""
    client, named = request.client.host if request.client else "", request.headers.get("host")
    by_name = named is None or place.is_loopback(_host_of(f"//{named}"))
    return (not client or place.is_loopback(client)) and by_name
