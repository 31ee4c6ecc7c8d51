"""One merged model behind Winnow and behind bare vLLM, asked in turns: ``python scripts/bench_serving.py --json``.

Beside them bare vLLM with an adapter on that model at run time, as it would be without a merge. All are up at once
with the same engine settings on the same cores, and only one is asked at a time, there and back in each round and
concurrency (Winnow, bare, adapter, bare, Winnow): what changes in the machine meanwhile falls on both. Every request
streams a fixed number of tokens. Needs no account and no network: the model has the shape of the smallest that people
chat with (0.1 billion parameters), random weights in 16 bits and the tiny base's vocabulary, unless ``--model`` names a
registered one. With ``--shape tiny --requests 32 --each 16`` a step of the model costs next to nothing: that shows what
is around it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp

import serving_load
import shapes

_RAYS_NICENESS = 15
"""Of its workers: all sides stand in the same order, on the same cores."""
_SPINS_S = 1.5
"""A worker of vLLM's that is a process of its own looks for work without a pause for a second after its last."""


def main() -> int:
    arguments, cores = _arguments(), len(os.sched_getaffinity(0))
    with (
        serving_load.model(arguments.model, serving_load.SERVING, arguments.shape) as model,
        serving_load.deployed(model) as ours,
        _bare(model) as bare,
        _adapter(model) as adapter,
    ):
        _ask_from_elsewhere()
        runs = asyncio.run(measure({"winnow": ours, "bare": bare, "adapter": adapter}, model, arguments))
    for run in runs:
        print("  ".join(f"{name} {value}" for name, value in run.items()), file=sys.stderr)
    if arguments.json:
        print(json.dumps({"device": f"cpu ({cores} cores)", "model": arguments.model or arguments.shape, "runs": runs}))
    return 0


async def measure(urls: dict[str, str], model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, for each concurrency; ratios are Winnow over bare, and bare over the adapter."""
    found: dict[int, dict[str, list[dict[str, float]]]] = {
        c: {side: [] for side in urls} for c in arguments.concurrency
    }
    async with serving_load.session() as session:
        for turn in range(-1, arguments.rounds):  # the first round warms both up
            for concurrency in arguments.concurrency:
                requests = max(arguments.requests, arguments.each * concurrency)
                asked: dict[str, list[dict[str, float]]] = {side: [] for side in urls}
                for side in [*urls, *list(urls)[-2::-1]]:
                    await asyncio.sleep(_SPINS_S)  # of the side that was asked before
                    one = await _load(session, urls[side], model, concurrency, requests, arguments.tokens)
                    told = "  ".join(f"{key} {value:.4g}" for key, value in one.items())
                    print(
                        f"round {turn + 1} of {arguments.rounds}, {concurrency} at once, {side}: {told}",
                        file=sys.stderr,
                    )
                    asked[side].append(one)
                if turn >= 0:
                    for side, ones in asked.items():
                        mean = {key: statistics.mean(one[key] for one in ones) for key in ones[0]}
                        found[concurrency][side].append(mean)
    return [_compared(concurrency, sides) for concurrency, sides in found.items()]


def _ask_from_elsewhere() -> None:
    """Read what comes as it comes, as another machine would. As a common process this one waits behind vLLM's spinning
    ones for a quarter of a second at a time, and whole answers come to it at once, of some sides more than of others.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the same core in each turn
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        print("no right to real-time priority: whoever asks may be starved, and ratios be off", file=sys.stderr)


def _compared(concurrency: int, sides: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    run: dict[str, Any] = {"concurrency": concurrency}
    for key, name in (("tokens_s", "throughput"), ("ttft_s", "ttft"), ("token_s", "time_per_token")):
        values = {side: statistics.median(one[key] for one in rounds) for side, rounds in sides.items()}
        for ratio, (one, other) in {"ratio": ("winnow", "bare"), "merged_over_adapter": ("bare", "adapter")}.items():
            ratios = [mine[key] / theirs[key] for mine, theirs in zip(sides[one], sides[other], strict=True)]
            run |= {f"{name}_{ratio}": round(statistics.median(ratios), 3)}
        run |= {f"{side}_{key}": round(value, 5) for side, value in values.items()}
    return run


async def _load(
    session: aiohttp.ClientSession, url: str, model: str, concurrency: int, requests: int, tokens: int
) -> dict[str, float]:
    """So many requests, so many at once: tokens a second, median seconds to the first token and for each next one."""
    waiting = iter(range(requests))
    firsts, nexts = [], []

    async def client() -> None:
        for number in waiting:
            timed = await serving_load.stream(session, url, model, f"Repeat: lemon {number}", tokens)
            firsts.append(timed.first_s)
            nexts.append(timed.rest_s / (tokens - 1))

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    wall = time.monotonic() - started
    return {
        "tokens_s": requests * tokens / wall,
        "ttft_s": statistics.median(firsts),
        "token_s": statistics.median(nexts),
    }


@contextmanager
def _adapter(model: str) -> Iterator[str]:
    """vLLM's own server with an adapter of rank 16 on all linear layers, of random weights, under the model's name."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from serving import registry

    with tempfile.TemporaryDirectory() as directory:
        base = AutoModelForCausalLM.from_pretrained(registry.find(model).path, dtype=torch.float32)
        adapter = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, adapter).save_pretrained(directory)
        lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"{model}={directory}"]
        with _bare(model, "without-adapter", lora) as url:
            yield url


@contextmanager
def _bare(model: str, name: str = "", more: Sequence[str] = ()) -> Iterator[str]:
    """vLLM's own server, as ``name``, with the settings that the version was registered with and ``more`` options."""
    from serving import engine, registry
    from serving.spec import with_changes

    version, port = registry.find(model), serving_load.free_port()
    spec = with_changes(version.record["serving"], {})
    command = ["nice", "-n", str(_RAYS_NICENESS), sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(version.path)]
    command += ["--served-model-name", name or model, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in engine.engine_kwargs(spec).items():
        option = "--" + name.replace("_", "-")
        command += [option] if value is True else [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    environment = os.environ | engine.environment(spec)
    command += ["--disable-uvicorn-access-log", *more]
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310  our own loopback address
            return
        except urllib.error.URLError:
            time.sleep(1)
    raise RuntimeError("vLLM's own server did not come up")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument("--model", help="a registered model (default: one made here)")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="0.1b", help="of the model that is made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=8, help="the least a round asks of each side")
    parser.add_argument("--each", type=int, default=2, help="requests of each client in a round, at the least")
    parser.add_argument("--tokens", type=int, default=64, help="that each request streams")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(serving_load.as_command(main))
