"""A port of a replica's own: HTTP without Serve's proxy before it, and without a message of Ray's for every token.

Several replicas on a machine may share one port; the kernel gives each a share of the connections.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

_BACKLOG = 2048


class Listener:
    """Serves an ASGI application on ``host:port`` from its making to ``close``; port 0 takes a free one.

    Raises:
        OSError: the port is taken by something that does not share it.
    """

    def __init__(self, application: Any, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token is not kept for the next one
        if port:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind((host, port))
        self._socket.listen(_BACKLOG)  # whoever connects before uvicorn is up waits
        self._server = uvicorn.Server(
            uvicorn.Config(
                application, lifespan="off", access_log=False, log_config=None, timeout_keep_alive=60, backlog=_BACKLOG
            )
        )
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def close(self) -> None:
        """Take no more connections, finish what has begun, and end."""
        self._server.should_exit = True
        await self._task
