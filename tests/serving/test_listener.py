from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import os
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import until

from serving import listener
from serving.listener import Listener

CLIENTS = 6


def application(name: str) -> Any:
    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": name.encode()})

    return answer


def client(port: int, keeps: bool, scratch: Path) -> tuple[int, list[tuple[float, str]]]:
    """Ask again and again, never twice for one answer: how many requests were lost, and who answered when."""
    lost, seen, connection = 0, [], http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not (scratch / "enough").exists():
        try:
            connection.request("POST", "/")
            reply = connection.getresponse()
            seen.append((time.time(), reply.read().decode()))
            (scratch / str(os.getpid())).touch()
        except (http.client.HTTPException, OSError):
            lost += 1
            connection.close()
        if not keeps:
            connection.close()
        time.sleep(0.005)
    return lost, seen


def test_of_two_on_one_port_one_ends_and_no_request_is_lost(tmp_path: Path) -> None:
    async def run(pool: ProcessPoolExecutor) -> None:
        first = Listener(application("1"), "127.0.0.1", 0)
        port = int(first.url.rpartition(":")[2])
        await first.close()
        first, second = (Listener(application(name), "127.0.0.1", port) for name in "12")
        loop = asyncio.get_running_loop()
        clients = [loop.run_in_executor(pool, client, port, number % 4 > 0, tmp_path) for number in range(CLIENTS)]
        async with asyncio.timeout(60):
            while len([*tmp_path.iterdir()]) < CLIENTS:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        ending = time.time()
        await first.close()
        closed = time.time()
        await asyncio.sleep(0.5)
        (tmp_path / "enough").touch()
        results = await asyncio.gather(*clients)
        await second.close()
        assert [lost for lost, _ in results] == [0] * CLIENTS
        seen = [one for _, some in results for one in some]
        assert {name for at, name in seen if at < ending} == {"1", "2"}
        assert {name for at, name in seen if at > closed} == {"2"}

    with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
        asyncio.run(run(pool))


REQUEST = b"POST /%d HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"


def on_a_connection(monkeypatch: pytest.MonkeyPatch, play: Any) -> list[str]:
    """What the application saw of a client that ``play`` acts: requests that came, and those that were left."""
    monkeypatch.setattr(listener, "_LAST_ANSWERS_S", 0.0)
    monkeypatch.setattr(listener, "_LAST_REQUESTS_S", 0.0)
    seen: list[str] = []

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        if scope["path"] == "/9":
            await receive()
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"no"})
            return
        size, message = 0, await receive()
        while message["type"] == "http.request" and message["more_body"]:
            size, message = size + len(message["body"]), await receive()
        if scope["path"] == "/0":
            size += len(message["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(size).encode()})
            return
        while message["type"] != "http.disconnect":
            message = await receive()
        seen.append(f"{scope['path']} left")

    async def run() -> None:
        served = Listener(application, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
        async with asyncio.timeout(20):
            await play(reader, writer, seen)
        writer.close()
        await served.close()

    asyncio.run(run())
    return seen


@pytest.mark.parametrize(
    "then", [REQUEST % (2, 0), b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"]
)
def test_a_client_that_sent_more_than_is_answered_yet_has_left_all_the_same(monkeypatch, then: bytes) -> None:
    async def play(reader, writer, seen) -> None:
        writer.write(REQUEST % (1, 0))
        await asyncio.sleep(0.1)
        writer.write(then)
        await asyncio.sleep(0.1)
        writer.close()
        while len(seen) < 2:
            await asyncio.sleep(0.01)

    assert on_a_connection(monkeypatch, play) == ["/1", "/1 left"]


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"POST / HTTP/1.1\r\n" + b"X: " + b"x" * 400_000, 431, "head_too_large"),
        (b"POST / HTTP/1.1\r\n" + b"X: y\r\n" * 80_000, 431, "head_too_large"),
        (b"POST / HTTP/1.1\r\nHost:", 408, "head_too_slow"),
        (b"\x16\x03\x01\x02\x00", 400, "invalid_http"),
        (b"", None, None),
    ],
)
def test_a_head_without_an_end_is_not_waited_for(monkeypatch, head: bytes, status: int | None, code: str) -> None:
    monkeypatch.setattr(listener, "_HEAD_S", 0.5)

    async def play(reader, writer, seen) -> None:
        with suppress(ConnectionError):
            for start in range(0, len(head), 10_000):
                writer.write(head[start : start + 10_000])
                await writer.drain()
                await asyncio.sleep(0)
        answer = b""
        with suppress(ConnectionError):
            answer = await reader.read()
        if status and answer:  # a client that is still writing may see no more than the end
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == code
        assert answer or len(head) > 65_536 or not head

    assert on_a_connection(monkeypatch, play) == []


def test_a_long_body_after_half_a_head_is_answered(monkeypatch) -> None:
    monkeypatch.setattr(listener, "_HEAD_S", 0.5)
    request = REQUEST % (0, 200_000) + b"x" * 200_000

    async def play(reader, writer, seen) -> None:
        for cut in (10, len(request), 10):
            writer.write(request[:cut])
            await asyncio.sleep(0.1)
            writer.write(request[cut:])
            assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert b"200000" in await reader.readuntil(b"0\r\n\r\n")
            await asyncio.sleep(0.6)  # longer than a head may take

    assert on_a_connection(monkeypatch, play) == ["/0"] * 3


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: h2c\r\n\r\n"


@pytest.mark.parametrize("cut", [30, 130, len(REQUEST % (0, 5) + UPGRADE) - 1, 1000])
def test_a_request_that_would_like_another_protocol_is_answered_in_this_one(monkeypatch, cut: int) -> None:
    """Java's own client sends each request so."""
    request = (REQUEST % (0, 5)).removesuffix(b"\r\n") + UPGRADE + b"hello"

    async def play(reader, writer, seen) -> None:
        for _ in range(3):
            writer.write(request[:cut])
            await asyncio.sleep(0.05)
            writer.write(request[cut:])
            assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"0\r\n\r\n") == b"1\r\n5\r\n0\r\n\r\n"
        writer.write(b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 405 ")

    assert on_a_connection(monkeypatch, play) == ["/0"] * 3


@pytest.mark.parametrize("size", [2**25, None], ids=["of one answer", "of many"])
def test_a_client_that_reads_nothing_is_not_kept_and_one_that_reads_slowly_is(monkeypatch, size: int | None) -> None:
    monkeypatch.setattr(listener, "STALLED_S", 0.3)

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (size or 200_000)})

    async def run() -> None:
        loop, served = asyncio.get_running_loop(), Listener(application, "127.0.0.1", 0)
        port, connections = int(served.url.rpartition(":")[2]), served._server.server_state.connections
        with (
            socket.create_connection(("127.0.0.1", port)) as deaf,
            socket.create_connection(("127.0.0.1", port)) as slow,
        ):
            for client in (deaf, slow):
                client.setblocking(False)
            await loop.sock_sendall(slow, REQUEST % (1, 0))
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(10):
                    for _ in range(1 if size else 1000):
                        await loop.sock_sendall(deaf, REQUEST % (1, 0))
                        await asyncio.sleep(0.01)
            took = 0
            while took < (size or 200_000):
                took += len(await loop.sock_recv(slow, 2**20))
                await asyncio.sleep(0.04)
            await until(lambda: len(connections) == 1)
        await served.close()

    asyncio.run(run())


def test_of_requests_without_a_pause_the_first_is_answered_and_the_connection_ends(monkeypatch) -> None:
    async def play(reader, writer, seen) -> None:
        writer.write((REQUEST % (0, 3) + b"abc") * 3)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 OK" in head
        assert b"connection: close" in head
        assert await reader.read() == b"1\r\n3\r\n0\r\n\r\n"

    assert on_a_connection(monkeypatch, play) == ["/0"]


def test_what_is_refused_before_its_end_is_read_for_a_while_and_the_next_request_answered(monkeypatch) -> None:
    monkeypatch.setattr(listener, "_HEAD_S", 1.0)

    async def play(reader, writer, seen) -> None:
        for _ in range(2):
            writer.write(REQUEST % (9, 400_000) + b"x" * 1000)
            assert b" 413 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"no"
            for _ in range(399):
                writer.write(b"x" * 1000)
                await writer.drain()
            writer.write(REQUEST % (0, 3) + b"abc")
            assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"0\r\n\r\n") == b"1\r\n3\r\n0\r\n\r\n"
        writer.write(REQUEST % (9, 400_000) + b"x" * 1000)
        await reader.readuntil(b"no")
        with suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"x")
                await asyncio.sleep(0.1)
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.01)

    assert on_a_connection(monkeypatch, play) == ["/9", "/0", "/9", "/0", "/9"]


def test_what_follows_a_body_in_chunks_is_not_kept(monkeypatch) -> None:
    async def play(reader, writer, seen) -> None:
        writer.write(b"POST /9 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert b" 413 " in await reader.readuntil(b"no")
        writer.write(b"0\r\n")
        with suppress(ConnectionError):
            for number in range(400):
                writer.write(b"X-%d: %b\r\n" % (number, b"x" * 1000))
                await writer.drain()
                await asyncio.sleep(0.001)
            raise AssertionError("400 KB of trailers were taken")

    assert on_a_connection(monkeypatch, play) == ["/9"]


def test_a_connection_whose_request_was_refused_before_its_end_is_not_kept_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(listener, "_KEPT_S", 1)

    async def play(reader, writer, seen) -> None:
        writer.write(REQUEST % (9, 5) + b"x")
        assert b" 413 " in await reader.readuntil(b"no")
        writer.write(b"xxxx")
        assert await reader.read() == b"", "it ends"

    assert on_a_connection(monkeypatch, play) == ["/9"]


def test_there_are_only_so_many_connections(monkeypatch) -> None:
    monkeypatch.setattr(listener, "_most_connections", lambda: 0)

    async def play(reader, writer, seen) -> None:
        with suppress(ConnectionError):
            assert await reader.read() == b""

    assert on_a_connection(monkeypatch, play) == []
