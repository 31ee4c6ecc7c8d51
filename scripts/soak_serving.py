"""An endpoint under mixed traffic for long, and what its processes become: ``python scripts/soak_serving.py --json``.

Streams, whole answers, JSON by a schema, feedback, tokens, mistakes, and clients that leave in the middle, one hour of
it unless ``--seconds`` says otherwise. Memory and open files of every process under the endpoint's head node are
sampled all the while. Exit status 1 where a request failed that should not have, a process stayed that no replica of
Serve's has use for, or one that was there from the first kept growing. Without ``--url`` a tiny model is made and
deployed here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

import serving_load

GROWTH = 0.10
SLACK_MIB, SLACK_FILES = 8.0, 16
"""By how much a process may be larger at the end than after its first fifth, and have more files open: a share, and at
least so many."""
_SAMPLES = 100
_SETTLED_S = 120.0
"""How long replicas may take to come, or to go, before and after the traffic."""
_REPLICA = "ray::ServeReplica"
_KINDS = {"streamed": 6, "whole": 4, "as_json": 1, "tokens": 1, "mistaken": 1, "leaving": 1}
"""What clients do (``Asker``), and how often of all that they do."""
_SCHEMA = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}


@dataclass
class Asker:
    """One client's way to the endpoint."""

    session: aiohttp.ClientSession
    url: str
    model: str

    def body(self, **more: Any) -> dict[str, Any]:
        lemon = {"role": "user", "content": f"Repeat: lemon {random.randrange(10_000)}"}
        return {"model": self.model, "messages": [lemon], "max_tokens": 32} | more

    async def post(self, path: str, body: Any, status: int = 200) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: another status.
        """
        async with self.session.post(self.url.removesuffix("/v1") + path, json=body) as reply:
            if reply.status != status:
                raise RuntimeError(f"{path}: {reply.status} in the place of {status}: {(await reply.text())[:200]}")
            return await reply.json()

    async def streamed(self) -> None:
        await serving_load.stream(self.session, self.url, self.model, self.body()["messages"][0]["content"], 32)

    async def whole(self) -> None:
        answer = await self.post("/v1/chat/completions", self.body(ignore_eos=True))
        await self.post("/v1/feedback", {"id": answer["id"], "score": random.random()})

    async def as_json(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}
        await self.post("/v1/chat/completions", self.body(response_format=form))

    async def tokens(self) -> None:
        await self.post("/tokenize", {"model": self.model, "prompt": "lemon"})

    async def mistaken(self) -> None:
        await self.post("/v1/chat/completions", {"model": "another"}, 404)
        await self.post("/v1/chat/completions", self.body(max_tokens=-1), 400)

    async def leaving(self) -> None:
        asked = self.body(stream=True, max_tokens=200, ignore_eos=True)
        async with self.session.post(f"{self.url}/chat/completions", json=asked) as reply:
            await reply.content.readany()
            reply.close()


@dataclass
class Soak:
    """What happened so far."""

    root: psutil.Process
    asked: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    """By process: MiB that are its own, and open files."""
    families: list[set[int]] = field(default_factory=list)
    of_replicas: set[int] = field(default_factory=set)
    """At the last sample: replicas, and what they started."""

    def sample(self) -> None:
        family = set()
        self.of_replicas = set()
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                with process.oneshot():
                    if process.status() == psutil.STATUS_ZOMBIE:
                        continue
                    seen = (process.memory_full_info().uss / 2**20, process.num_fds())
                    self.names[process.pid] = _role(process)
                    if process.ppid() in self.of_replicas or self.names[process.pid].startswith(_REPLICA):
                        self.of_replicas.add(process.pid)
            except psutil.NoSuchProcess:
                continue
            family.add(process.pid)
            self.sizes.setdefault(process.pid, []).append(seen)
        self.families.append(family)

    def replicas(self) -> int:
        """How many processes are replicas of Serve's now."""
        found = 0
        for process in self.root.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += process.status() != psutil.STATUS_ZOMBIE and _role(process).startswith(_REPLICA)
        return found


def main() -> int:
    arguments = _arguments()
    with _endpoint(arguments) as (url, model, root):
        os.nice(19)
        soak = Soak(psutil.Process(root))
        _settle(soak)
        soak.sample()  # whatever comes from now on, came with the load
        asyncio.run(_traffic(soak, url, model, arguments))
        _settle(soak)
        soak.sample()
        if _result(soak, arguments.seconds)["leaked"]:  # a process that Ray has just begun has no name yet
            time.sleep(2)
            soak.sample()
    result = _result(soak, arguments.seconds)
    for one in result["processes"]:
        print("  ".join(f"{key} {value}" for key, value in one.items()), file=sys.stderr)
    print(f"asked {dict(soak.asked)}; failed {dict(soak.failed)}; leaked {result['leaked']}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    return 0 if result["sound"] else 1


def _settle(soak: Soak) -> None:
    """Wait until as many replicas run as Serve knows of, and none comes or goes.

    Raises:
        RuntimeError: that does not happen.
    """
    command, deadline = [sys.executable, "-m", "serving", "status", "--json"], time.monotonic() + _SETTLED_S
    while True:
        told = subprocess.run(command, cwd=serving_load.ROOT, capture_output=True, check=True)
        states: Counter[str] = Counter()
        for application in json.loads(told.stdout)["applications"].values():
            for replicas in application["replicas"].values():
                states.update(replicas)
        found = soak.replicas()
        if states == {"RUNNING": found}:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"Serve has replicas {dict(states)}, and {found} processes are some")
        time.sleep(1)


async def _traffic(soak: Soak, url: str, model: str, arguments: argparse.Namespace) -> None:
    async with serving_load.session() as session:
        asker = Asker(session, url, model)
        for kind in _KINDS:
            await _once(soak, asker, kind)
        until, told = time.monotonic() + arguments.seconds, time.monotonic()
        every = arguments.seconds / _SAMPLES
        clients = [asyncio.create_task(_client(soak, asker, until, arguments.pause)) for _ in range(arguments.clients)]
        await asyncio.sleep(every * 5)  # engines and ingress load what they need at their first requests
        while time.monotonic() < until:
            await asyncio.to_thread(soak.sample)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{until - told:.0f} s left: {soak.asked.total()} asked, {dict(soak.failed)}", file=sys.stderr)
            await asyncio.sleep(every)
        await asyncio.gather(*clients)


async def _client(soak: Soak, asker: Asker, until: float, pause_s: float) -> None:
    while time.monotonic() < until:
        await _once(soak, asker, random.choices(list(_KINDS), list(_KINDS.values()))[0])
        await asyncio.sleep(random.uniform(0, 2 * pause_s))


async def _once(soak: Soak, asker: Asker, kind: str) -> None:
    soak.asked[kind] += 1
    try:
        await getattr(asker, kind)()
    except (RuntimeError, aiohttp.ClientError) as error:
        soak.failed[f"{kind}: {type(error).__name__}: {str(error)[:150]}"] += 1


def _result(soak: Soak, seconds: float) -> dict[str, Any]:
    stayed = soak.families[-1] & soak.families[0]  # a replica that came with the load grows until it serves
    processes = [_process(soak.names[pid], soak.sizes[pid]) for pid in stayed]
    came = [soak.names[pid] for pid in sorted(soak.families[-1] - soak.families[0] - soak.of_replicas)]
    leaked = [name for name in came if not name.startswith("ray::IDLE")]  # Ray keeps a few ready; they come and go
    return {
        "seconds": seconds,
        "asked": dict(soak.asked),
        "failed": dict(soak.failed),
        "leaked": leaked,
        "processes": sorted(processes, key=lambda one: -one["mib"]),
        "sound": not soak.failed and not leaked and all(one["flat"] for one in processes),
    }


def _process(name: str, seen: list[tuple[float, int]]) -> dict[str, Any]:
    fifth = max(1, len(seen) // 5)
    early, late = seen[fifth : 2 * fifth] or seen[:1], seen[-fifth:]
    before, after = (statistics.median(mib for mib, _ in part) for part in (early, late))
    files_before, files_after = (statistics.median(files for _, files in part) for part in (early, late))
    return {
        "process": name,
        "mib": round(after, 1),
        "grew_mib": round(after - before, 1),
        "files": int(files_after),
        "more_files": int(files_after - files_before),
        "flat": after - before <= max(SLACK_MIB, GROWTH * before)
        and files_after - files_before <= max(SLACK_FILES, GROWTH * files_before),
    }


def _role(process: psutil.Process) -> str:
    """What a process is, by its command line, without paths; of Ray's without the method that it is at."""
    command = process.cmdline() or [process.name()]
    if command[0].startswith("ray::"):
        return command[0].partition(".")[0]
    return re.sub(r"\S*/", "", " ".join(part for part in command[:3] if not part.startswith("-")))[:60].strip()


@contextmanager
def _endpoint(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Its address, its model, and the process under which all of it runs."""
    from serving import place

    if arguments.url:
        head = place.own_head()
        assert head, "WINNOW_HOME has an endpoint that deploy started"
        yield arguments.url, arguments.model, head.pid
        return
    with serving_load.model(arguments.model, serving_load.SERVING) as name, serving_load.deployed(name) as url:
        head = place.own_head()
        assert head, "deployed"
        yield url, name, head.pid


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--pause", type=float, default=0.1, metavar="S", help="of a client between requests, on average"
    )
    parser.add_argument("--url", help="an endpoint of WINNOW_HOME, up to and with /v1, in the place of one made here")
    parser.add_argument("--model", help="a registered model; needed with --url")
    arguments = parser.parse_args()
    if arguments.url and not arguments.model:
        parser.error("--url needs --model")
    return arguments


if __name__ == "__main__":
    sys.exit(serving_load.as_command(main))
