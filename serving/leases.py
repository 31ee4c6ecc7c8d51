"""Places in a replica: handed out through Serve, opened over HTTP.

A lease is the place of one request at a time. While HTTP requests come with its token, one after the other, it is held;
to Serve it is one request that goes on, so its limits, queues, counts and draining hold for what it never sees.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from serving.listener import Listener

HEADER = "x-winnow-lease"
"""By what a request says which lease it takes."""
IDLE_S = 2.0
"""How long a lease is kept that nobody uses."""
NO_LEASE = 418
"""The status where there is none; vLLM never says that."""


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

    async def take(self) -> AsyncIterator[tuple[str, str]]:
        """A place: where it is and the token that opens it. It is held until it is not used for ``IDLE_S``, or until
        the caller cancels."""
        if not await self._answers():
            await asyncio.Event().wait()
        token, lease = secrets.token_urlsafe(16), _Lease()
        self._held[token] = lease
        try:
            yield self._listener.url, token
            while await lease.turned(IDLE_S) or lease.busy:
                pass
        finally:
            self._held.pop(token, None)

    async def close(self) -> None:
        await self._listener.close()

    async def _answers(self) -> bool:
        try:
            await self._check()
        except Exception:  # whatever it died of
            return False
        return True

    def _guarded(self, application: Any) -> Any:
        async def opened(scope: dict[str, Any], receive: Any, send: Any) -> None:
            token = dict(scope.get("headers", ())).get(HEADER.encode(), b"").decode()
            lease = self._held.get(token)
            if lease is None or lease.busy or not await self._answers():
                await send({"type": "http.response.start", "status": NO_LEASE, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
            lease.turn(busy=True)
            try:
                await application(scope, receive, send)
            finally:
                lease.turn(busy=False)

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
            await asyncio.wait_for(self._turn.wait(), within_s)
        except TimeoutError:
            return False
        self._turn.clear()
        return True
