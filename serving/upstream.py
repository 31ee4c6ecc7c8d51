"""Where a request is answered: a leased place in a replica of ours, or somebody else's endpoint.

By HTTP either way, but for streams of a replica on the same machine: those it writes to the client itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serving import handover, leases
from serving.errors import ApiError
from serving.handover import Begun, Broken, Gone, Lending, Line

_TRIES, _PAUSE_S, _LONGER = 8, 0.2, 1.5
"""How many new places are tried that turn out to be gone, for nothing was sent to them yet, and how long after each
other: Ray may take seconds to see that a replica died."""
_KEPT_S = 0.1
"""Serve takes a lease for a request, used or not: those that are kept for long make replicas that nobody needs."""
_GOOD_S, _LONG_S = (4.0, 8.0), 5.0
"""How long a choice of Serve's holds, give or take; and for how long after that Serve is asked anew beside a request,
and not before it. A replica that is to end waits for its leases, and for one answer of each after that: within
``spec._ENDS_S``, and what an answer may take."""
_SOON_S, _ANSWER_S = 0.2, 0.5
"""How long after a request is sent Serve is asked: most have their first token then. And how long that may take: to
Serve it is a request like any, which takes the place of others where all are busy."""

Reply = aiohttp.ClientResponse | Begun
"""The head of an answer: its ``status``, and its body by ``read()`` where it is no stream."""


class Overloaded(ApiError):
    """No place for a request now. It was not begun, so it may go elsewhere."""

    def __init__(self, message: str, retry_after_s: float = 1) -> None:
        super().__init__(503, message, "overloaded", retry_after_s=retry_after_s)

    def __reduce__(self) -> Any:
        return Overloaded, (self.message, self.retry_after_s)


class Left(Exception):
    """The version takes no requests any more. Nothing was sent to it."""


@dataclass(eq=False)
class Place:
    """A lease: where it is, what opens it, and Serve's call that holds it."""

    address: str
    desk: str
    token: str
    call: Any
    until: float
    """When Serve has to choose anew: replicas come and go, and one that is to end waits for its leases."""
    end: asyncio.TimerHandle | None = None
    """Gives it up, where no request takes it once it is kept."""
    renewal: asyncio.Task[None] | None = None
    _line: Line | None = None

    def line(self) -> Line | None:
        """To the replica, where that is on this machine."""
        if self._line is None and self.desk:
            self._line = Line.to(self.desk)
            self.desk = self.desk if self._line else ""
        return self._line

    @property
    def is_over(self) -> bool:
        """Serve was asked anew, and has not chosen this replica again."""
        return self.renewal is not None and self.renewal.done()

    def give_up(self) -> None:
        """For good, and with it what is answered there."""
        self.call.cancel()
        if self.renewal:
            self.renewal.cancel()
        if self._line:
            self._line.close()


@dataclass
class Replies:
    """The HTTP client of one ingress replica, with a handle to each version that it has asked, and the leases that its
    last requests left: a lease that is taken again costs no message of Ray's.

    Args:
        applications: of models whose application is not called as they are.
    """

    applications: dict[str, str] = field(default_factory=dict)
    _handles: dict[tuple[str, str], Any] = field(default_factory=dict)
    _free: dict[tuple[str, str], list[Place]] = field(default_factory=dict)
    _waiting: dict[tuple[str, str], set[asyncio.Future[Any]]] = field(default_factory=dict)
    _session: aiohttp.ClientSession | None = None

    def keep_to(self, model: str, versions: Sequence[str]) -> None:
        """Whoever waits for a place in another version of the model would wait for ever, and is told that it left."""
        for (name, version), waiting in self._waiting.items():
            if name == model and version not in versions:
                for call in waiting:
                    call.cancel()

    @asynccontextmanager
    async def from_version(
        self,
        model: str,
        version: str,
        path: str,
        payload: bytes,
        wait_s: float,
        lending: Lending | None = None,
        place_s: float | None = None,
        taken: Callable[[bool], None] | None = None,
    ) -> AsyncIterator[Reply]:
        """One request to whichever replica of ``version`` Serve has a place in; leaving the block ends it there too.

        Args:
            wait_s: for a place and the head of the answer.
            lending: of a stream whose client's connection can be lent; where the replica is on this machine, it is.
            place_s: for a place alone, where it may be no longer.
            taken: told that there is one, and again, that there is none, where it turns out to be gone.

        Raises:
            Overloaded: no place, or no replica that answers.
            Left: the version does not take requests any more.
            TimeoutError: none in time.
        """
        async with asyncio.timeout(wait_s):
            place, reply = await self._reach(model, version, path, payload, lending, place_s, taken)
        try:
            if isinstance(reply, Begun):
                yield reply
            else:
                async with reply:
                    yield reply
        except BaseException:
            place.give_up()
            raise
        if reply.ended if isinstance(reply, Begun) else reply.content.at_eof():
            self._keep(model, version, place)
        else:
            place.give_up()

    async def _reach(
        self,
        model: str,
        version: str,
        path: str,
        payload: bytes,
        lending: Lending | None,
        place_s: float | None,
        taken: Callable[[bool], None] | None,
    ) -> tuple[Place, Reply]:
        """A place, and the head of the answer from there. Where a place turns out to be gone another one is taken, for
        nothing has begun there."""
        tries, began = 0, time.monotonic()

        def gone(place: Place) -> None:
            place.give_up()
            if taken:
                taken(False)

        while tries < _TRIES:
            if (place := self._kept(model, version)) is None:
                tries += 1
                left_s = None if place_s is None else began + place_s - time.monotonic()
                async with asyncio.timeout(left_s):
                    place = await self._lease(model, version)
                    if place is None:
                        await asyncio.sleep(_PAUSE_S * _LONGER ** (tries - 1))
                        continue
            reply: Reply
            if taken:
                taken(True)
            try:
                if lending and (line := place.line()):
                    if not line.is_open:
                        gone(place)
                        continue
                    reply = await line.ask(place.token, path, payload, lending)
                else:
                    reply = await self._send(place.address + path, payload, {leases.HEADER: place.token})
            except (aiohttp.ClientConnectorError, Gone):
                gone(place)
                continue
            except (aiohttp.ClientError, Broken) as error:
                place.give_up()
                raise Overloaded(f"a replica of {model}@{version} went away before it answered") from error
            except BaseException:  # a client that left too: the place is free again at once
                place.give_up()
                raise
            if reply.status != handover.NO_LEASE:
                return place, reply
            if isinstance(reply, aiohttp.ClientResponse):
                reply.release()
            gone(place)
        raise Overloaded(f"no replica of {model}@{version} can be reached")

    async def _lease(self, model: str, version: str) -> Place | None:
        """A new place; None where the replica ended before it gave one. Serve waits for a replica where there is none.

        Raises:
            Overloaded: as many as may wait do.
            Left: the version left meanwhile.
        """
        if (handle := self._handles.get((model, version))) is None:
            application = self.applications.get(model, model)
            handle = serve.get_deployment_handle(version, application, _check_exists=False)  # it may be yet to come
            handle = handle.options(method_name="lease", stream=True)
            self._handles[model, version] = handle
        call: Any = handle.remote()
        first = asyncio.ensure_future(anext(call))
        waiting = self._waiting.setdefault((model, version), set())
        waiting.add(first)
        try:
            address, desk, token = await first
            return Place(address, desk, token, call, _good_until())
        except BackPressureError as error:
            raise Overloaded(f"{model}@{version} is overloaded; try again") from error
        except (RayServeException, RayError, StopAsyncIteration):
            return None
        except BaseException as error:
            call.cancel()
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and not task.cancelling():  # not by who asks
                raise Left from None
            raise
        finally:
            waiting.discard(first)

    def _kept(self, model: str, version: str) -> Place | None:
        """The lease that was left last, if it is still one."""
        free, now = self._free.get((model, version), []), time.monotonic()
        while free:
            place = free.pop()
            if place.end:
                place.end.cancel()
            if now < place.until + _LONG_S and not place.is_over:
                if now > place.until and place.renewal is None:
                    place.renewal = asyncio.create_task(self._renew(model, version, place))
                return place
            place.give_up()
        return None

    async def _renew(self, model: str, version: str, place: Place) -> None:
        """Ask Serve for a place while this one is used. If it chooses the same replica, the old place is as good, and
        no request waits for the choice. If another, which has fewer requests, that place is kept as any is; then, or if
        there is none in time, the old one is given up once its request is done."""
        await asyncio.sleep(_SOON_S)
        try:
            async with asyncio.timeout(_ANSWER_S):
                other = await self._lease(model, version)
        except (Overloaded, Left, TimeoutError):
            return
        if other is None:
            return
        if other.address != place.address:
            self._keep(model, version, other)
            return
        other.give_up()
        place.until, place.renewal = _good_until(), None

    def _keep(self, model: str, version: str, place: Place) -> None:
        """For the next request, for a moment, unless it is over."""
        if place.is_over:
            place.give_up()
            return
        free = self._free.setdefault((model, version), [])
        free.append(place)

        def let_go() -> None:
            free.remove(place)
            place.give_up()

        place.end = asyncio.get_running_loop().call_later(_KEPT_S, let_go)

    @asynccontextmanager
    async def from_endpoint(
        self, base_url: str, path: str, payload: bytes, key: str | None, wait_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The same from any OpenAI-compatible endpoint. ``path`` is ours, with its ``/v1``."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with asyncio.timeout(wait_s):
                reply = await self._send(base_url.rstrip("/") + path.removeprefix("/v1"), payload, headers)
        except aiohttp.ClientError as error:
            raise Overloaded(f"the fallback {base_url} cannot be reached") from error
        async with reply:
            yield reply

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _send(self, url: str, payload: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        if self._session is None:  # within the replica's event loop
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return await self._session.post(url, data=payload, headers={"Content-Type": "application/json"} | headers)


def _good_until() -> float:
    """Not for all in one moment: asking for all of them anew made a pause."""
    return time.monotonic() + random.uniform(*_GOOD_S)


async def pieces(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Broken: it ended before its end.
    """
    try:
        async for piece in reply.content.iter_any():
            yield piece
    except aiohttp.ClientError as error:
        raise Broken from error
