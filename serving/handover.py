"""A client's connection, lent by the ingress to the replica that answers: tokens go from there straight to the client.

Where both are on one machine, the ingress asks over a Unix socket, and once the answer has begun it lends its client's
socket over that (SCM_RIGHTS). The ingress writes the answer's head and its end; in between the replica writes chunks,
and says at the end what they held. Elsewhere nobody listens at that address, and the ingress passes tokens on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, fields
from typing import Any

from serving.events import Stream, Told

_log = logging.getLogger("ray.serve")
NO_LEASE = 418
"""The status where there is no such lease; vLLM never says that."""
_LENGTH = struct.Struct("!I")
_READ = 2**18
_FLUSH_S = 0.002
_TOLD = {one.name for one in fields(Told)}
STALLED_S = 60.0
"""A client to which a few hundred bytes can't be written for so long has left, or reads as if: a place waits for it."""


class Broken(Exception):
    """The other side went away with the answer begun."""


class Gone(Exception):
    """It went away before: nothing has begun there."""


@dataclass(frozen=True)
class Lending:
    """What the replica has to know of an answer that it writes itself.

    Args:
        left_s: that the answer may take.
        show_usage, keep: as of ``events.Stream``.
    """

    left_s: float
    show_usage: bool
    keep: bool


class _Wire:
    """Frames over a Unix socket, and with an empty frame a descriptor."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._loop = connection, asyncio.get_running_loop()
        self._buffer, self._frames = bytearray(), deque[bytes]()
        self._descriptors = deque[int]()
        self._turn = asyncio.Event()
        self.ended = asyncio.Event()
        self._loop.add_reader(connection, self._read)

    async def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """
        Raises:
            OSError: the other side is gone.
        """
        whole = _LENGTH.pack(len(frame)) + frame
        try:
            sent = socket.send_fds(self._socket, [whole], descriptors) if descriptors else self._socket.send(whole)
        except BlockingIOError:
            if descriptors:
                raise  # a frame of four bytes, where nothing else is under way
            sent = 0
        if sent < len(whole):
            await self._loop.sock_sendall(self._socket, whole[sent:])

    async def next(self) -> bytes | None:
        """The next frame; None at the end."""
        while not self._frames and not self.ended.is_set():
            self._turn.clear()
            await self._turn.wait()
        return self._frames.popleft() if self._frames else None

    def descriptor(self) -> int:
        """What came with an empty frame."""
        return self._descriptors.popleft()

    def close(self) -> None:
        self._end()
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors.extend(descriptors)
        if not data:
            self._end()
            return
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            self._frames.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
            self._turn.set()

    def _end(self) -> None:
        if not self.ended.is_set():
            self._loop.remove_reader(self._socket)
            self.ended.set()
            self._turn.set()


class Line:
    """The ingress's end: one request at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._wire = _Wire(connection)

    @classmethod
    def to(cls, address: str) -> Line | None:
        """None where nobody listens: on another machine, or where the replica has ended."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(f"\0{address}")
        except OSError:
            connection.close()
            return None
        return cls(connection)

    @property
    def is_open(self) -> bool:
        return not self._wire.ended.is_set()

    async def ask(self, token: str, path: str, payload: bytes, lending: Lending) -> Begun:
        """The head of the answer.

        Raises:
            Gone: the replica went away before it was asked.
            Broken: or after that.
        """
        asked = {"token": token, "path": path} | vars(lending)
        try:
            await self._wire.send(json.dumps(asked).encode() + b"\n" + payload)
        except OSError:
            raise Gone from None
        status, _, body = (await self._answer()).partition(b"\n")
        return Begun(self, int(status), body)

    async def lend(self, client: asyncio.Transport) -> Told:
        """Let the replica write to the client, whose head is written, until it has no more to say.

        Raises:
            Broken: it went away; or the client did, as whoever waits for that learns.
        """
        pause_s = 0.0
        while client.get_write_buffer_size():
            await asyncio.sleep(pause_s)
            pause_s = _FLUSH_S
        try:
            await self._wire.send(b"", [client.get_extra_info("socket").fileno()])
        except (OSError, ValueError):
            raise Broken from None
        return await self.told()

    async def told(self) -> Told:
        """What the stream came to.

        Raises:
            Broken: the replica went away.
        """
        said = json.loads(await self._answer())  # by a replica of another release, perhaps
        return Told(**{name: said[name] for name in _TOLD & said.keys()})

    def close(self) -> None:
        """Where an answer is under way, the replica ends it."""
        self._wire.close()

    async def _answer(self) -> bytes:
        frame = await self._wire.next()
        if frame is None:
            raise Broken
        return frame


class Begun:
    """An answer's head. ``body`` is whole where it is no stream."""

    def __init__(self, line: Line, status: int, body: bytes) -> None:
        self.status, self._line, self._body = status, line, body
        self.ended = status != 200

    async def read(self) -> bytes:
        return self._body

    async def lend(self, client: asyncio.Transport) -> Told:
        """``Line.lend``."""
        told = await self._line.lend(client)
        self.ended = True
        return told

    async def last_word(self, within_s: float) -> Told:
        """Of a stream whose lending was given up: what the replica says within that time, or nothing."""
        try:
            async with asyncio.timeout(within_s):
                return await self._line.told()
        except (TimeoutError, Broken):
            return Told()


class Desk:
    """The replica's end: an ASGI application for whoever names a lease.

    Args:
        opened: enters a lease by its token; gives whether there is one.
    """

    def __init__(self, application: Any, opened: Callable[[str], AbstractAsyncContextManager[bool]]) -> None:
        self._application, self._opened = application, opened
        self._tasks = set[asyncio.Task[None]]()
        self.address = ""
        """Empty where the system has no abstract namespace of sockets, which leave no file behind."""
        if sys.platform != "linux":
            return
        self.address = f"winnow-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen(2048)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def close(self) -> None:
        """No new line; those that are there end with their answers, for their leases do."""
        if self.address:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._socket.accept()
            if _user(connection) not in (os.getuid(), 0):
                connection.close()
                return
            task = asyncio.get_running_loop().create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        wire = _Wire(connection)
        try:
            while (frame := await wire.next()) is not None:
                head, _, payload = frame.partition(b"\n")
                asked = json.loads(head)
                async with self._opened(asked.pop("token")) as known:
                    if known:
                        await _Exchange(wire, asked.pop("path"), payload, Lending(**asked)).run(self._application)
                    else:
                        await wire.send(b"%d\n" % NO_LEASE)
        except OSError:
            pass  # the ingress is gone, and with it whoever asked
        finally:
            wire.close()


class _Exchange:
    """One request, in the terms of ASGI."""

    def __init__(self, wire: _Wire, path: str, payload: bytes, lending: Lending) -> None:
        self._wire, self._payload, self._lending = wire, payload, lending
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload))],
            "client": None,
            "server": None,
        }
        self._stream = Stream(lending.show_usage, lending.keep)
        self._status, self._body = 500, b""
        self._client: socket.socket | None = None
        self._first_at: float | None = None
        self._asked = self._begun = self._deaf = self._torn = False
        self._limit: asyncio.Timeout | None = None

    async def run(self, application: Any) -> None:
        """
        Raises:
            OSError: the ingress is gone.
        """
        late = False
        try:
            async with asyncio.timeout(self._lending.left_s) as self._limit:
                await application(self._scope, self._receive, self._send)
        except TimeoutError:
            late = not self._deaf
        except ConnectionError:  # of the line: a client left before its socket was lent
            raise
        except Exception:
            _log.exception("vLLM's application failed")  # its own middleware has answered, where it still could
        finally:
            if self._begun:
                await self._borrow()  # what was lent is taken, though nothing was written to it
            if self._client is not None:
                self._client.close()
        if self._begun:
            told = self._stream.told(self._first_at, late, self._torn)
            await self._wire.send(json.dumps({name: value for name, value in vars(told).items() if value}).encode())
        else:
            await self._wire.send(b"%d\n%b" % (self._status, self._body))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._payload, "more_body": False}
        await self._wire.ended.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if self._status == 200 and kind.startswith(b"text/event-stream"):
                self._begun = True
                await self._wire.send(b"200\n")
        elif not self._begun:
            self._body += message.get("body", b"")
        else:
            await self._borrow()  # not at the head: vLLM generates once that is taken
            if not self._deaf and (out := self._stream.feed(message.get("body", b""))):
                self._first_at = self._first_at or time.monotonic()
                await self._write(b"%x\r\n%b\r\n" % (len(out), out))

    async def _borrow(self) -> None:
        if self._client is not None or self._deaf:
            return
        if await self._wire.next() is None:
            self._deaf = True
        else:
            self._client = socket.socket(fileno=self._wire.descriptor())

    async def _write(self, data: bytes) -> None:
        assert self._client is not None, "borrowed"
        self._torn = True
        try:
            try:
                sent = self._client.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                async with asyncio.timeout(STALLED_S):
                    await asyncio.get_running_loop().sock_sendall(self._client, data[sent:])
            self._torn = False
        except OSError:  # it left, or does as if it had
            self._deaf = True
            if self._limit is not None and not self._limit.expired():
                self._limit.reschedule(asyncio.get_running_loop().time())  # ends the answer where it waits next


def _user(connection: socket.socket) -> int:
    """Who is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
