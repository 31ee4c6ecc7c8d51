from __future__ import annotations

import asyncio
import http.client
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from serving.listener import Listener

CLIENTS = 8


def application(name: str) -> Any:
    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": name.encode()})

    return answer


def client(port: int, keeps: bool, seen: list[str], over: Event) -> int:
    """Ask again and again, and never a second time for one answer; how many requests were lost."""
    lost, connection = 0, http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not over.is_set():
        try:
            connection.request("POST", "/")
            reply = connection.getresponse()
            seen.append(reply.read().decode())
        except (http.client.HTTPException, OSError):
            lost += 1
            connection.close()
        if not keeps:
            connection.close()
        time.sleep(0.005)
    return lost


def test_of_two_on_one_port_one_ends_and_no_request_is_lost() -> None:
    async def run() -> None:
        first = Listener(application("1"), "127.0.0.1", 0)
        port = int(first.url.rpartition(":")[2])
        await first.close()
        first, second = (Listener(application(name), "127.0.0.1", port) for name in "12")
        seen: list[str] = []
        over, loop = Event(), asyncio.get_running_loop()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [
                loop.run_in_executor(pool, client, port, number % 4 > 0, seen, over) for number in range(CLIENTS)
            ]
            await asyncio.sleep(0.5)
            await first.close()
            ended = len(seen)
            await asyncio.sleep(0.5)
            over.set()
            assert await asyncio.gather(*clients) == [0] * CLIENTS
        await second.close()
        assert set(seen[:ended]) == {"1", "2"}
        assert set(seen[ended:]) == {"2"}

    asyncio.run(run())
