"""Replicas under a load that grows and goes: ``python scripts/bench_autoscale.py --json --picture scale.html``.

The model is deployed with no replica at the least. Clients that ask again and again come in phases; each phase's load,
replicas and latency are told, and drawn over time. It ends when the last replica is gone, with one more request: the
first after zero. Needs no account and no network, as ``bench_serving.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import serving_load

SERVING = {
    "engine_kwargs": serving_load.ENGINE,
    "max_ongoing_requests": 32,
    "autoscaling_config": {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 6,
        "look_back_period_s": 10.1,
        "upscale_delay_s": 3,
        "downscale_delay_s": 15,
    },
}
PHASES = ((1, 25), (16, 90), (4, 60), (0, 60))
_SAMPLE_S = 0.5


@dataclass
class Asked:
    """One request: seconds on the benchmark's clock, and how it ended."""

    at_s: float
    phase: int
    first_s: float = 0.0
    took_s: float = 0.0
    error: str | None = None


@dataclass
class Watched:
    """What was seen, on one clock that starts with the benchmark."""

    phases: list[tuple[int, float]]
    asked: list[Asked] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    """When, clients, replicas that run, replicas that start."""
    started: float = field(default_factory=time.monotonic)
    clients: int = 0

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.started


def main() -> int:
    arguments = _arguments()
    with serving_load.model(arguments.model, SERVING) as name, serving_load.deployed(name) as url:
        watched = Watched([(clients, seconds * arguments.scale) for clients, seconds in PHASES])
        with _sampled(watched, name):
            os.nice(19)
            first_after_zero_s = asyncio.run(_load(watched, url, name, arguments.tokens))
    result = {
        "device": f"cpu ({len(os.sched_getaffinity(0))} cores)",
        "failed": sum(one.error is not None for one in watched.asked),
        "errors": sorted({one.error for one in watched.asked if one.error}),
        "first_after_zero_s": first_after_zero_s,
        "phases": [_summary(watched, number) for number in range(len(watched.phases))],
    }
    for phase in result["phases"]:  # type: ignore[attr-defined]
        print("  ".join(f"{key} {value}" for key, value in phase.items()), file=sys.stderr)
    print(f"first request after zero: {first_after_zero_s} s", file=sys.stderr)
    if arguments.picture:
        _draw(watched, arguments.picture)
    if arguments.json:
        print(json.dumps(result))
    return 0


async def _load(watched: Watched, url: str, name: str, tokens: int) -> float:
    """The phases, until no replica is left; then the first request after zero, and how long that took."""
    async with serving_load.session() as asker:
        for number, (clients, seconds) in enumerate(watched.phases):
            print(f"{watched.now_s:.0f} s: {clients} clients for {seconds:.0f} s", file=sys.stderr)
            watched.clients, until = clients, watched.now_s + seconds
            await asyncio.gather(
                asyncio.sleep(seconds),
                *(_client(watched, asker, url, name, tokens, number, until) for _ in range(clients)),
            )
        deadline = watched.now_s + 120
        while watched.samples[-1][2] and watched.now_s < deadline:
            await asyncio.sleep(_SAMPLE_S)
        print(f"{watched.now_s:.0f} s: {watched.samples[-1][2]} replicas; one request", file=sys.stderr)
        watched.clients = 1
        one = await _ask(watched, asker, url, name, tokens, len(watched.phases))
        watched.clients = 0
        return round(one.took_s, 2)


async def _client(
    watched: Watched, asker: aiohttp.ClientSession, url: str, name: str, tokens: int, phase: int, until: float
) -> None:
    while watched.now_s < until:
        await _ask(watched, asker, url, name, tokens, phase)


async def _ask(watched: Watched, asker: aiohttp.ClientSession, url: str, name: str, tokens: int, phase: int) -> Asked:
    one = Asked(watched.now_s, phase)
    watched.asked.append(one)
    try:
        timed = await serving_load.stream(asker, url, name, f"Repeat: lemon {len(watched.asked)}", tokens)
        one.first_s = timed.first_s
    except (RuntimeError, aiohttp.ClientError) as error:
        one.error = str(error)[:200] or type(error).__name__
    one.took_s = watched.now_s - one.at_s
    return one


@contextmanager
def _sampled(watched: Watched, name: str) -> Iterator[None]:
    """Replicas and clients, twice a second, for the block."""
    from serving import place

    over = threading.Event()

    def go() -> None:
        from ray import serve

        while not over.wait(_SAMPLE_S):
            deployments = serve.status().applications[name].deployments
            engines = [one for key, one in deployments.items() if key not in ("ingress", "conductor")]
            states = {
                state: sum(one.replica_states.get(state, 0) for one in engines) for state in ("RUNNING", "STARTING")
            }  # type: ignore[call-overload]
            watched.samples.append((watched.now_s, watched.clients, states["RUNNING"], states["STARTING"]))

    with place.cluster(print, start=False):
        thread = threading.Thread(target=go)
        thread.start()
        while not watched.samples:
            time.sleep(0.1)
        try:
            yield
        finally:
            over.set()
            thread.join()


def _summary(watched: Watched, number: int) -> dict[str, Any]:
    clients, seconds = watched.phases[number]
    begins = sum(length for _, length in watched.phases[:number])
    here = [one for one in watched.asked if one.phase == number]
    replicas = [running for at, _, running, _ in watched.samples if begins <= at < begins + seconds]
    good = [one for one in here if one.error is None]
    last = [one for one in good if one.at_s >= begins + seconds * 2 / 3]  # with the replicas that the phase came to
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(here),
        "failed": len(here) - len(good),
        "replicas_before": replicas[0],
        "replicas_most": max(replicas),
        "replicas_after": replicas[-1],
        "latency_p50_s": _median(one.took_s for one in good),
        "latency_p50_at_last_s": _median(one.took_s for one in last),
        "first_token_p50_at_last_s": _median(one.first_s for one in last),
    }


def _median(values: Iterator[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 3) if found else None


def _draw(watched: Watched, file: Path) -> None:
    """Clients, replicas and latency over time, one under the other."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = ("clients that ask again and again", "replicas", "seconds to the last token of an answer")
    figure = make_subplots(3, 1, shared_xaxes=True, subplot_titles=rows, vertical_spacing=0.08)
    at = [sample[0] for sample in watched.samples]
    for row, column, label, color in (
        (1, 1, "clients", "#555"),
        (2, 2, "running", "#1f77b4"),
        (2, 3, "starting", "#ff7f0e"),
    ):
        values = [sample[column] for sample in watched.samples]
        line = go.Scatter(x=at, y=values, name=label, line={"shape": "hv", "color": color}, fill="tozeroy")
        figure.add_trace(line, row=row, col=1)
    for failed, color in ((False, "#2ca02c"), (True, "#d62728")):
        some = [one for one in watched.asked if (one.error is not None) is failed]
        dots = go.Scatter(
            x=[one.at_s for one in some],
            y=[one.took_s for one in some],
            mode="markers",
            marker={"size": 5, "color": color},
            name="failed" if failed else "answered",
        )
        figure.add_trace(dots, row=3, col=1)
    figure.update_yaxes(dtick=1, row=2, col=1).update_yaxes(type="log", row=3, col=1)
    figure.update_xaxes(title="seconds", row=3, col=1)
    figure.update_layout(template="plotly_white", height=800, title="Replicas under load")
    figure.write_html(file)
    print(f"picture: {file}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument(
        "--model", help="a registered model with an autoscaling_config (default: a tiny one, made here)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="that each request streams")
    parser.add_argument("--scale", type=float, default=1, help="of the seconds that each phase takes")
    parser.add_argument("--picture", type=Path, help="write load, replicas and latency over time as an HTML page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(serving_load.as_command(main))
