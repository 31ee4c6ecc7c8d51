"""Places in a replica: handed out through Serve, opened over HTTP, or on the same machine over a Unix socket.

A lease is the place of one request at a time. While requests come with its token, one after the other, it is held;
to Serve it is one request that goes on, so its limits, queues, counts and draining hold for what it never sees.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from serving.handover import NO_LEASE, Desk
from serving.listener import Listener

HEADER = "x-winnow-lease"
"""By what a request says which lease it takes."""
IDLE_S = 2.0
"""How long a lease is kept that nobody uses."""


class Leases:
    """Serves an ASGI application on a free port of ``host``, to whoever has a lease and to nobody else.

    Args:
        check: raises where the application cannot answer any more. Then nothing new is let in: no lease is known, and
            whoever wants one waits until this process ends.
    """

    def __init__(self, application: Any, host: str, check: Callable[[], Awaitable[None]]) -> None:
        self._held: dict[str, _Lease] = {}
        self._check = check
        self._listener = Listener(self._guarded(application), host, 0)
        self._desk = Desk(application, self._opened)

    async def take(self) -> AsyncIterator[tuple[str, str, str]]:
        """A place: its URL, its desk's address, and the token that opens it at either. It is held until it is not used
        for ``IDLE_S``, or until the caller cancels."""
        if not await self._answers():
            await asyncio.Event().wait()
        token, lease = secrets.token_urlsafe(16), _Lease()
        self._held[token] = lease
        try:
            yield self._listener.url, self._desk.address, token
            while await lease.turned(IDLE_S) or lease.busy:
                pass
        finally:
            self._held.pop(token, None)

    async def close(self) -> None:
        self._desk.close()
        await self._listener.close()

    async def _answers(self) -> bool:
        try:
            await self._check()
        except Exception:  # whatever it died of
            return False
        return True

    @asynccontextmanager
    async def _opened(self, token: str) -> AsyncIterator[bool]:
        """Whether there is such a lease, to be used by nobody else within the block."""
        lease = self._held.get(token)
        if lease is None or lease.busy or not await self._answers():
            yield False
            return
        lease.turn(busy=True)
        try:
            yield True
        finally:
            lease.turn(busy=False)

    def _guarded(self, application: Any) -> Any:
        async def opened(scope: dict[str, Any], receive: Any, send: Any) -> None:
            token = dict(scope.get("headers", ())).get(HEADER.encode(), b"").decode()
            async with self._opened(token) as known:
                if known:
                    await application(scope, receive, send)
                    return
            await send({"type": "http.response.start", "status": NO_LEASE, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        return opened


class _Lease:
    def __init__(self) -> None:
        self.busy, self._turn = False, asyncio.Event()

    def turn(self, busy: bool) -> None:
        self.busy = busy
        self._turn.set()

    async def turned(self, within_s: float) -> bool:
        """Whether it was taken or left within that time."""
        try:
            async with asyncio.timeout(within_s):  # wait_for loses a cancellation that comes with the turn
                await self._turn.wait()
        except TimeoutError:
            return False
        self._turn.clear()
        return True
