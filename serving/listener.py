"""A port of a replica's own: HTTP without Serve's proxy before it, and without a message of Ray's for every token.

Several replicas on a machine may share one port; the kernel gives each a share of the connections.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import socket
import sys
import termios
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import ApiError
from serving.handover import STALLED_S

CLIENT = "winnow.client"
"""Where a request's scope has the transport of its connection, if that can be lent (``handover``)."""
CONNECTION = "winnow.connection"
"""The same of every request, to be ended."""
_BACKLOG = 2048
_LAST_ANSWERS_S, _LAST_REQUESTS_S = 1.0, 1.0
"""How long, at the end, clients are told with their answers to connect elsewhere; and then, with no new connection,
how long what was connected last has to send its request."""

_KEPT_S = 60
"""How long a connection is kept on which nothing is asked."""
_HEAD_S, _MOST_OF_A_HEAD = 30.0, 65_536
"""How long a request's first line and headers may take, and their bytes; and how long what is left of a request
that was refused."""


_OTHER_PROTOCOLS = {b"upgrade", b"http2-settings"}
"""What of a head asks to go on in another protocol, as Java's own client does in each request: in HTTP/2."""


class _Connection(HttpToolsProtocol):
    """uvicorn's, which has no limits for a request's head, nor for a client that does not read, loses the body of a
    request that would like another protocol, and does not see a client leave that sent its next request before it had
    its answer. Here such a request is not read: the connection ends with the answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: int | None = None
        self._until: asyncio.TimerHandle | None = None
        self._begun = self._within = self._over = False
        self._beside = 0
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._begin_head()
        if len(self.connections) > _most_connections():
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._reads()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if self._head is None and not self._answering and not self._within:
            self._begin_head()
        head = self._until
        self._beside += len(data) if self._within else 0
        self._feed(data)
        if self._beside > _MOST_OF_A_HEAD:
            self.transport.abort()
        elif self._head is not None and self._until is head:  # and not of the next request, which began with its end
            self._head += len(data)
            if self._head > _MOST_OF_A_HEAD:
                told = f"the request's head must be at most {_MOST_OF_A_HEAD} bytes, but is longer"
                self._refuse(ApiError(431, told, "head_too_large"))

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            if not self._over:
                self._ask_again(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self._refuse(ApiError(400, "this is no HTTP request", "invalid_http"))

    def _ask_again(self, rest: bytes) -> None:
        """The same request without its wish for another protocol; ``rest`` is what came of its body."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(ApiError(405, "this is no proxy", "method_not_allowed"))
            return
        head = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                wanted = [one.strip() for one in value.split(b",")]
                value = b", ".join(one for one in wanted if one.lower() not in _OTHER_PROTOCOLS) or b"keep-alive"
            if name not in _OTHER_PROTOCOLS:
                head.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._feed(b"\r\n".join([*head, b"", rest]))

    def on_message_begin(self) -> None:
        if self._answering:
            self._over, self.cycle.keep_alive = True, False
        elif self._head is None:
            self._begin_head()
        self._begun = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._within:  # after a body in chunks there may be more of them, which nobody here wants
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._over:
            self._end_head()
            self._reads()  # it will be seen at the end of the answer, or when that has to wait
            if not self.parser.should_upgrade():
                self._within = True
                super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside = 0
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._over and not self.parser.should_upgrade():
            self._within, self._beside = False, 0
            self._end_head()
            super().on_message_complete()
            if self.cycle.response_complete:  # and nothing else waits for what comes next
                self._unset_keepalive_if_required()
                end = self.timeout_keep_alive_handler
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, end)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._within:  # it was refused before its end, which the client may have to send before it reads that
            self._until = self.loop.call_later(_HEAD_S, self.transport.abort)
        self._has_to_read()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._has_to_read()

    def resume_writing(self) -> None:
        self._reads()
        super().resume_writing()
        if not self._answering:
            self._has_to_read()

    def _has_to_read(self) -> None:
        """The client has, what is written and has not gone: some of it each minute."""
        self._reads()
        if left := self._unread():
            self._reading = self.loop.call_later(STALLED_S, self._look, left)

    def _look(self, before: int) -> None:
        if self._unread() < before:
            self._has_to_read()
        else:
            self.transport.abort()

    def _unread(self) -> int:
        """Bytes, with those that the kernel keeps for it: it takes more only when a third of its room is free. 0 where
        all is with the kernel."""
        if not (ours := self.transport.get_write_buffer_size()):
            return 0
        kept = bytearray(4)
        with suppress(OSError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kept)
        return ours + int.from_bytes(kept, sys.byteorder)

    def _reads(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin_head(self) -> None:
        self._head, self._until = 0, self.loop.call_later(_HEAD_S, self._too_slow)

    def _end_head(self) -> None:
        self._head, self._begun = None, False
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _too_slow(self) -> None:
        if not self._begun:
            self.transport.abort()  # nothing came at all
            return
        told = f"the request's head must be here within {_HEAD_S:g} s, but is not"
        self._refuse(ApiError(408, told, "head_too_slow"))

    def _refuse(self, error: ApiError) -> None:
        """The end of the connection; of one that is being answered, without a word that would be within the answer."""
        if self._answering:
            self.transport.abort()
            return
        body = json.dumps(error.body).encode()
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def _most_connections() -> int:
    """Half of the files that this process may open: an answer takes a second one."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


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
                http=_Connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=_KEPT_S,
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
        for connection in self._let_go_of_port():
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(_LAST_REQUESTS_S)
        self._server.should_exit = True
        await self._task

    def _let_go_of_port(self) -> list[socket.socket]:
        """Stop to listen: connections that the kernel made meanwhile, and would reset when the port closes."""
        found = []
        with self._socket.dup() as port:  # closes at once when no connection is left
            for server in self._server.servers:
                server.close()
            port.setblocking(False)
            with suppress(BlockingIOError):
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

            scope[CONNECTION] = send.__self__.transport  # uvicorn's own; nothing public leads there
            if scope.get("http_version") == "1.1":  # before that, an answer has no chunks
                scope[CLIENT] = scope[CONNECTION]
            await application(scope, receive, last if self._closing else send)

        return telling
