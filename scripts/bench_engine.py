"""Adapter-steps a second of the shared-base engine against solo training, whole machine against whole machine.

    python scripts/bench_engine.py --json [--device cuda] [--shape tiny|0.1b|0.5b|8b] [--rounds 3] [--picture FILE]
                                   [--dequantise once|every-pass]

Three sides, interleaved in one go, for each number of adapters K and of tokens in one adapter's step:

- packed: on a CPU one engine a core, as the quickstart has them, the K slots spread over them; on a GPU one engine;
- sequential: the K steps one after the other in one process, with all cores;
- concurrent: as many solo processes as there are cores (on a GPU: ``--processes``), each on its own.

Solo is stock transformers, peft and bitsandbytes: forward, backward, clip, AdamW. What a trainer adds around a step is
not counted, so the ratios understate what a sweep gains. The engine keeps its base dequantised, as a sweep's does where
memory allows, or with ``--dequantise every-pass`` not. Each side's processes live as long as the benchmark; ratios
are medians over rounds. Weights are random: no ratio depends on them. No Ray.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shapes

sys.path.insert(0, str(Path(__file__).parent.parent))

ROWS = 8
"""Examples in a batch where a step has tokens enough for that."""


@dataclass(frozen=True)
class Point:
    """One place of the curve."""

    slots: int
    tokens: int


@dataclass(frozen=True)
class Side:
    """What a worker process is: an engine's or solo's, with so many threads."""

    kind: str
    threads: int
    device: str
    base: str
    r: int
    keeps_dequantised: bool


def main() -> int:
    arguments = _arguments()
    cores = len(os.sched_getaffinity(0))
    cuda = arguments.device == "cuda"
    engines, processes = (1, arguments.processes or 4) if cuda else (cores, arguments.processes or cores)
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        shapes.make(arguments.shape, Path(scratch), device=arguments.device)
        common = (arguments.device, scratch, arguments.r, arguments.dequantise == "once")
        sides = {
            "packed": [Side("packed", 1 if not cuda else cores, *common)] * engines,
            "sequential": [Side("solo", cores, *common)],
            "concurrent": [Side("solo", 1, *common)] * processes,
        }
        crews = {name: [_Worker(side) for side in crew] for name, crew in sides.items()}
        workers = [worker for crew in crews.values() for worker in crew]
        for worker in workers:
            worker.receive()
        curve, lost = [], False
        try:
            for point in (Point(k, t) for t in arguments.tokens for k in arguments.slots):
                curve.append(_measure(point, crews, arguments.rounds, arguments.steps))
        except RuntimeError as error:  # what was measured is told all the same
            lost = True
            print(f"bench: {error}", file=sys.stderr)
        for worker in workers:
            worker.stop()
    told = {name: getattr(arguments, name) for name in ("shape", "rounds", "dequantise")}
    result = {"device": _device_name(cuda), **told, "curve": curve}
    if arguments.picture:
        _draw(result, arguments.picture)
    if arguments.json:
        print(json.dumps(result))
    return int(lost)


def _measure(point: Point, crews: dict[str, list[_Worker]], rounds: int, steps: int) -> dict[str, Any]:
    """Median adapter-steps a second of each side, and packed over each of the others."""
    rates: dict[str, list[float]] = {name: [] for name in crews}
    for crew in crews.values():  # what a first step compiles or allocates is nobody's speed
        _rate(point, crew, 1)
    for _ in range(rounds):
        for name, crew in crews.items():
            rates[name].append(_rate(point, crew, steps))
    ratios = {
        f"vs_{name}": statistics.median(p / s for p, s in zip(rates["packed"], rates[name], strict=True))
        for name in ("sequential", "concurrent")
    }
    found = {"slots": point.slots, "tokens": point.tokens}
    found |= {name: round(statistics.median(values), 3) for name, values in rates.items()}
    found |= {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(f"  {found}", file=sys.stderr, flush=True)
    return found


def _rate(point: Point, crew: list[_Worker], steps: int) -> float:
    """Adapter-steps a second of a crew that shares ``point.slots`` adapters; a solo worker steps one at a time."""
    shares = [len(range(place, point.slots, len(crew))) for place in range(len(crew))]
    started = time.monotonic()
    busy = [(worker, share) for worker, share in zip(crew, shares, strict=True) if share]
    for worker, share in busy:
        worker.send((share, point.tokens, steps))
    for worker, _ in busy:
        worker.receive()
    return point.slots * steps / (time.monotonic() - started)


class _Worker:
    """A process of one side."""

    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(side, theirs), daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be seen here

    def send(self, order: tuple[int, int, int]) -> None:
        self.pipe.send(order)

    def receive(self) -> None:
        """Wait until it has done what it was sent, or loaded its base.

        Raises:
            RuntimeError: it has ended instead.
        """
        try:
            self.pipe.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark ended; its error stands above") from None

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()


def _work(side: Side, pipe: Connection) -> None:
    """Loads the base, then steps ``steps`` times with ``share`` adapters of ``tokens`` tokens, as often as told."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if side.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(side.threads)
    stepper: Any = _Packed(side) if side.kind == "packed" else _Solo(side)
    pipe.send("done")
    while (order := pipe.recv()) is not None:
        stepper.step(*order)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send("done")


class _Rows:
    """As much of a snapshot as an engine reads."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.found = [_row(tokens, vocabulary, seed) for seed in range(64 * ROWS)]

    def rows(self, split: str) -> list[dict[str, Any]]:
        return self.found if split == "train" else self.found[:1]


class _Packed:
    """The engine, with as many slots as are asked for."""

    def __init__(self, side: Side) -> None:
        from trainables.engine import Engine
        from trainables.spec import BaseModelSpec

        self.spec, self.r = BaseModelSpec(model_name_or_path=side.base), side.r
        self.engine: Any = Engine(self.spec, _Rows(32, 64), capacity=32)  # type: ignore[arg-type]
        self.engine.keep_dequantised(side.keeps_dequantised)
        self.asked: tuple[int, int] = (0, 0)

    def step(self, share: int, tokens: int, steps: int) -> None:
        from trainables.engine import Failed

        if self.asked != (share, tokens):
            self._fill(share, tokens)
        for _ in range(steps):
            if failed := [event for event in self.engine.advance() if isinstance(event, Failed)]:
                raise RuntimeError(f"{len(failed)} of {share} trials failed: {failed[0].message}")
        if self.engine.counters.splits:
            raise RuntimeError(f"{share} trials of {tokens} tokens do not fit at once")

    def _fill(self, share: int, tokens: int) -> None:
        from trainables.contract import TrialConfig
        from trainables.slots import examples_of
        from trainables.spec import TrainingSpec

        engine, self.asked = self.engine, (share, tokens)
        engine.slots, engine.stays = [], []
        engine.train = examples_of(_Rows(tokens, engine.model.config.vocab_size).rows("train"))
        engine.lengths = [len(example.input_ids) for example in engine.train]
        batch = _rows(tokens)
        for number in range(share):
            training = TrainingSpec(
                r=self.r, num_train_epochs=10_000, per_device_train_batch_size=batch, evals_per_epoch=1, seed=number
            )
            engine.admit(TrialConfig(f"t{number}", self.spec, training, "", batch))


class _Solo:
    """Stock peft on the same base: one adapter's step after the other's."""

    def __init__(self, side: Side) -> None:
        import torch
        from peft import get_peft_model, prepare_model_for_kbit_training

        from trainables import base, lora
        from trainables.spec import BaseModelSpec, TrainingSpec

        spec = BaseModelSpec(model_name_or_path=side.base)
        model = prepare_model_for_kbit_training(base.load_model(spec), use_gradient_checkpointing=False)
        self.model = get_peft_model(model, lora.config(TrainingSpec(r=side.r))).train()
        self.dtype, self.device = base.compute_dtype(spec), base.device()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=2e-4)
        self.vocabulary = model.config.vocab_size

    def step(self, share: int, tokens: int, steps: int) -> None:
        import torch

        rows = [_row(tokens, self.vocabulary, seed) for seed in range(_rows(tokens))]
        ids, labels = (torch.tensor([row[k] for row in rows], device=self.device) for k in ("input_ids", "labels"))
        for _ in range(steps * share):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def _rows(tokens: int) -> int:
    return min(ROWS, tokens // 8)


def _row(tokens: int, vocabulary: int, seed: int) -> dict[str, list[int]]:
    """One example: all of a length, as no padding at all is solo's best case; half of its tokens are learned."""
    import numpy

    length = tokens // _rows(tokens)
    ids = numpy.random.default_rng(seed).integers(0, vocabulary, length).tolist()
    return {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}


def _device_name(cuda: bool) -> str:
    if not cuda:
        return f"cpu ({len(os.sched_getaffinity(0))} cores)"
    import torch

    return torch.cuda.get_device_name()


def _draw(result: dict[str, Any], file: Path) -> None:
    """Both ratios over the number of adapters, a line for each number of tokens."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("against sequential", "against concurrent"), shared_yaxes=True)
    for tokens in sorted({place["tokens"] for place in result["curve"]}):
        own = [place for place in result["curve"] if place["tokens"] == tokens]
        for column, name in enumerate(("vs_sequential", "vs_concurrent"), 1):
            line = go.Scatter(x=[p["slots"] for p in own], y=[p[name] for p in own], name=f"{tokens} tokens {name}")
            figure.add_trace(line, row=1, col=column)
    figure.update_xaxes(type="log", title="adapters").add_hline(y=1, line_dash="dot")
    title = f"Packed over solo, adapter-steps a second: {result['shape']} on {result['device']}"
    figure.update_layout(title=title, template="plotly_white")
    figure.write_html(file)
    print(f"picture: {file}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine's speed against solo training.")
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of every adapter in one measurement")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512, 2048, 4096])
    parser.add_argument("--processes", type=int, help="concurrent solo processes; default: cores, or 4 on a GPU")
    parser.add_argument("--dequantise", choices=["once", "every-pass"], default="once", help="4-bit layers of packed")
    parser.add_argument("--picture", type=Path, help="write the curve as an HTML page")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda needs a CUDA device, but torch finds none on this machine; use --device cpu")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
