"""A port of a replica's own: HTTP without Serve's proxy before it, and without a message of Ray's for every token.

Several replicas on a machine may share one port; the kernel gives each a share of the connections.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import uvicorn

CLIENT = "winnow.client"
"""Where a request's scope has the transport of its connection, if that can be lent (``handover``)."""
_BACKLOG = 2048
_LAST_ANSWERS_S, _LAST_REQUESTS_S = 1.0, 1.0
"""How long, at the end, clients are told with their answers to connect elsewhere; and then, with no new connection,
how long what was connected last has to send its request."""


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
        self._closing = False
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._told(application),
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=60,
                backlog=_BACKLOG,
            )
        )
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def close(self) -> None:
        """End, and lose no request: a client that keeps its connection may be sending the next one at any moment."""
        self._closing = True
        await asyncio.sleep(_LAST_ANSWERS_S)
        waiting = self._not_yet_accepted()
        for server in self._server.servers:
            server.close()
        for connection in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(_LAST_REQUESTS_S)
        self._server.should_exit = True
        await self._task

    def _not_yet_accepted(self) -> list[socket.socket]:
        """Connections that the kernel made and would reset when the port closes."""
        found = []
        with suppress(BlockingIOError), self._socket.dup() as port:
            port.setblocking(False)
            while True:
                found.append(port.accept()[0])
        return found

    def _protocol(self) -> Any:
        """As uvicorn makes one for a connection."""
        server = self._server
        make: Any = server.config.http_protocol_class  # a class, once it serves
        return make(config=server.config, server_state=server.server_state, app_state=server.lifespan.state)

    def _told(self, application: Any) -> Any:
        async def telling(scope: dict[str, Any], receive: Any, send: Any) -> None:
            async def last(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            if scope.get("http_version") == "1.1":  # before that, an answer has no chunks
                scope[CLIENT] = send.__self__.transport  # uvicorn's own; nothing public leads there
            await application(scope, receive, last if self._closing else send)

        return telling
