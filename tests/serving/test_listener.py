from __future__ import annotations

import asyncio
import http.client
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from serving.listener import Listener

CLIENTS = 6


def application(name: str) -> Any:
    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": name.encode()})

    return answer


def client(port: int, keeps: bool, until: float) -> tuple[int, list[tuple[float, str]]]:
    """Ask again and again, never twice for one answer: how many requests were lost, and who answered when."""
    lost, seen, connection = 0, [], http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while time.time() < until:
        try:
            connection.request("POST", "/")
            reply = connection.getresponse()
            seen.append((time.time(), reply.read().decode()))
        except (http.client.HTTPException, OSError):
            lost += 1
            connection.close()
        if not keeps:
            connection.close()
        time.sleep(0.005)
    return lost, seen


def test_of_two_on_one_port_one_ends_and_no_request_is_lost() -> None:
    async def run(pool: ProcessPoolExecutor) -> None:
        first = Listener(application("1"), "127.0.0.1", 0)
        port = int(first.url.rpartition(":")[2])
        await first.close()
        first, second = (Listener(application(name), "127.0.0.1", port) for name in "12")
        loop, until = asyncio.get_running_loop(), time.time() + 8
        clients = [loop.run_in_executor(pool, client, port, number % 4 > 0, until) for number in range(CLIENTS)]
        await asyncio.sleep(5)  # a process of Python's takes a moment to start
        await first.close()
        closed = time.time()
        results = await asyncio.gather(*clients)
        await second.close()
        assert [lost for lost, _ in results] == [0] * CLIENTS
        seen = [one for _, some in results for one in some]
        assert {name for at, name in seen if at < closed - 2} == {"1", "2"}
        assert {name for at, name in seen if at > closed} == {"2"}

    with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
        asyncio.run(run(pool))
