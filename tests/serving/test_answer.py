"""The work for a client, which ends where the client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.answer import unless_gone


class Client:
    """Leaves when told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def _work(ended: list[str]) -> str:
    try:
        await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    return "done"


def test_the_work_of_a_client_that_stays_is_done() -> None:
    async def play() -> None:
        assert await unless_gone(Client().receive, _work([])) == "done"
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody watches any more"

    asyncio.run(play())


def test_the_work_of_a_client_that_leaves_ends_and_whoever_did_it_goes_on() -> None:
    async def play() -> None:
        client, ended = Client(), []
        asyncio.get_running_loop().call_later(0.02, client.leaves.set)
        assert await unless_gone(client.receive, _work(ended)) is None
        assert ended == ["cancelled"]
        await asyncio.sleep(0)  # not cancelled itself

    asyncio.run(play())


@pytest.mark.parametrize("leaves", [False, True])
def test_whoever_cancels_all_of_it_does(leaves: bool) -> None:
    async def play() -> None:
        client, ended = Client(), []
        task = asyncio.create_task(unless_gone(client.receive, _work(ended)))
        await asyncio.sleep(0.02)
        if leaves:
            client.leaves.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["cancelled"]

    asyncio.run(play())
