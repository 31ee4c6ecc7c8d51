"""Where a request is answered: a leased place in a replica of ours, or somebody else's endpoint, by HTTP either way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serving.errors import ApiError
from serving.listener import LEASE_HEADER

_CONNECTS = 3
"""How many replicas are tried that die between lease and request: nothing was sent to them yet."""


class Overloaded(ApiError):
    """No place for a request now. It was not begun, so it may go elsewhere."""

    def __init__(self, message: str, retry_after_s: float = 1) -> None:
        super().__init__(503, message, "overloaded", retry_after_s=retry_after_s)

    def __reduce__(self) -> Any:
        return Overloaded, (self.message, self.retry_after_s)


class Broken(Exception):
    """The other side went away with the answer begun."""


@dataclass
class Replies:
    """The HTTP client of one ingress replica, and a handle to each version that it has asked."""

    _handles: dict[tuple[str, str], Any] = field(default_factory=dict)
    _session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def from_version(
        self, model: str, version: str, path: str, payload: bytes, wait_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request to whichever replica of ``version`` Serve has a place in; leaving the block ends it there too.

        Args:
            wait_s: for a place and the head of the answer.

        Raises:
            Overloaded: no place, or no replica that answers.
            TimeoutError: none in time.
        """
        for attempt in range(_CONNECTS):
            place = self._handle(model, version).remote()
            try:
                async with asyncio.timeout(wait_s):
                    address, token = await _lease(place, f"{model}@{version}")
                    reply = await self._send(address + path, payload, {LEASE_HEADER: token})
            except aiohttp.ClientConnectorError:
                if attempt + 1 == _CONNECTS:
                    raise Overloaded(f"no replica of {model}@{version} can be reached") from None
                continue
            except aiohttp.ClientError as error:
                raise Overloaded(f"a replica of {model}@{version} went away before it answered") from error
            except BaseException:  # a client that left too: the place is free again at once
                place.cancel()
                raise
            async with reply:
                yield reply
            return

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

    def _handle(self, model: str, version: str) -> Any:
        if (model, version) not in self._handles:
            handle = serve.get_deployment_handle(version, model)
            self._handles[model, version] = handle.options(method_name="lease", stream=True)
        return self._handles[model, version]

    async def _send(self, url: str, payload: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        if self._session is None:  # within the replica's event loop
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return await self._session.post(url, data=payload, headers={"Content-Type": "application/json"} | headers)


async def _lease(place: Any, version: str) -> tuple[str, str]:
    """A replica's address, and the token that opens it."""
    try:
        return await anext(place)
    except BackPressureError as error:
        raise Overloaded(f"{version} is overloaded; try again") from error
    except (RayServeException, RayError, StopAsyncIteration) as error:
        raise Overloaded(f"no replica of {version} is up") from error


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
