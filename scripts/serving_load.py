"""What the serving scripts share: a registered model, an endpoint of ours, and streams of a fixed length."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

import shapes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NAME = "bench"
ENGINE = {"max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True, "dtype": "float32"}
SERVING = {"engine_kwargs": ENGINE, "max_ongoing_requests": 64}


class Timed(NamedTuple):
    """One streamed answer: seconds from its request to its first token, and from there to its last."""

    first_s: float
    rest_s: float


def as_command(main: Callable[[], int]) -> int:
    """Its exit status; ended by Ctrl-C or SIGTERM it stops what it started, a Ray cluster among it."""
    from cluster.command import guarded

    return guarded(main, "interrupted")


@contextmanager
def model(name: str | None, serving: dict[str, Any], shape: str = "tiny") -> Iterator[str]:
    """A registered model's name: ``name``, or where that is None one of that shape in a home of its own."""
    if name:
        yield name
        return
    with tempfile.TemporaryDirectory() as home:
        os.environ["WINNOW_HOME"] = home
        base = tiny_base(Path(home))
        if shape != "tiny":
            _grow(base, shape)
            serving = serving | {"engine_kwargs": serving["engine_kwargs"] | {"dtype": "bfloat16"}}
        register(NAME, base, serving)
        yield NAME


def tiny_base(home: Path) -> Path:
    """The barely trained base with its tokenizer."""
    base = home / "tiny"
    command = [sys.executable, ROOT / "scripts/make_tiny_base.py", "--out", base, "--steps", "30"]
    subprocess.run(command, check=True, stdout=2)
    return base


def _grow(base: Path, shape: str) -> None:
    """Random weights of that shape in the place of its own; the tokenizer stays, and each token is one it can spell."""
    from transformers import AutoConfig

    shapes.make(shape, base, vocabulary=AutoConfig.from_pretrained(base).vocab_size)


def register(name: str, source: Path, serving: dict[str, Any]) -> None:
    """The files of ``source`` as the production version of ``name``."""
    from serving import registry

    with registry.staging(name) as staged:
        for file in source.iterdir():
            if file.is_file():
                shutil.copyfile(file, staged / file.name)
        version = registry.register(name, staged, {"serving": serving})
    registry.set_alias(name, registry.PRODUCTION, version.version, "benchmark")


@contextmanager
def deployed(name: str) -> Iterator[str]:
    """The model's endpoint, up to and with ``/v1``, until the block ends."""
    command = [sys.executable, "-m", "serving"]
    deploy = subprocess.Popen(
        [*command, "deploy", name, "--port", str(free_port()), "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        told, _ = deploy.communicate()
    except BaseException:  # it undoes what it began
        deploy.terminate()
        deploy.wait()
        raise
    if deploy.returncode:
        raise RuntimeError(f"deploy ended with exit status {deploy.returncode}")
    try:
        yield json.loads(told.splitlines()[-1])["url"]
    finally:
        subprocess.run([*command, "stop"], cwd=ROOT, check=True)


def free_port() -> int:
    """Without Ray's, for whoever imports ray cannot ask for its token any more."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def session() -> aiohttp.ClientSession:
    """For as many requests at once as anybody likes."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))


async def stream(asker: aiohttp.ClientSession, url: str, name: str, prompt: str, tokens: int) -> Timed:
    """Have exactly so many tokens streamed.

    Raises:
        RuntimeError: another status than 200, or a stream without its end.
        aiohttp.ClientError: the connection broke.
    """
    body = {
        "model": name,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, last = time.monotonic(), None, b""
    async with asker.post(f"{url}/chat/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {await reply.text()}")
        async for piece in reply.content.iter_any():
            first = first or time.monotonic()  # vLLM's first event comes with its first token
            last = (last + piece)[-2000:]
    if f'"completion_tokens":{tokens}'.encode() not in last:
        raise RuntimeError(f"the stream ended with {last[-300:]!r}")
    ended = time.monotonic()
    first = first or ended
    return Timed(first - started, ended - first)
