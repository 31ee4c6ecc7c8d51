"""The trial contract: what a backend is given, what it reports, and how it says that a trial cannot go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainables.spec import BaseModelSpec, EvaluationSpec, TrainingSpec

Reason = Literal["oom", "nan", "error", "lost"]

_SEAL = "files.json"
REPORT = "report.json"
"""In a checkpoint: the report that it was handed out with."""

ADAPTER = "adapter"
"""In a checkpoint: the adapter of the best evaluation so far, in PEFT's format. Everything else is the backend's."""


@dataclass(frozen=True)
class TrialConfig:
    """All that a trial depends on; equal configs give equal trials."""

    trial_id: str
    base_model: BaseModelSpec
    training: TrainingSpec
    dataset: str
    """Absolute directory of the data snapshot."""
    reference_batch: int
    """Examples in one step of the shared axis: the definition's own effective batch."""


@dataclass(frozen=True)
class Measurement:
    """What a trial answers once it is trained, where a search goes by its answers."""

    base_model: BaseModelSpec
    evaluation: EvaluationSpec
    prompts: int
    """Of the eval split, at most."""


class Peer(NamedTuple):
    """Another trial's evaluation out of the same pass of an engine, on the shared step axis."""

    trial_id: str
    step: int
    eval_loss: float


@dataclass(frozen=True)
class Report:
    """One evaluation of a running trial.

    ``step`` lies on the axis that all trials of a sweep share: examples seen over the definition's effective batch, so
    that a scheduler compares like with like when trials differ in batch size. ``seconds`` counts training and
    evaluation of this trial over all its attempts; ``device_seconds`` its share of its device in them: a solo trial has
    all of it by the wall clock, a packed one its share of the engine's own work (of its thread's, on a CPU).
    """

    eval_loss: float
    step: int
    epoch: float
    trained_tokens: int
    train_loss: float
    seconds: float
    device_seconds: float
    best_eval_loss: float
    peers: tuple[Peer, ...] = ()
    """Beside which the trial was evaluated: whoever judges it may judge them together."""
    last: bool = False
    """A packed trial has come to its end with it; of others it is not said."""

    def as_dict(self) -> dict[str, Any]:
        """What the report says of its own trial's training."""
        return {name: value for name, value in asdict(self).items() if name in REPORTED}

    def for_its_judge(self) -> dict[str, Any]:
        """What else whoever judges it needs to know."""
        return {"peers": self.peers, "last": self.last}


REPORTED = tuple(field.name for field in fields(Report) if field.name not in ("peers", "last"))
"""What is kept of a report."""


ReportFunction = Callable[[Report, Path], None]
"""Takes a report and the directory of a checkpoint from which the trial can go on; the directory is then ours."""


class TrialFailure(Exception):
    """A trial that cannot go on and would not if it were tried again."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: Reason = reason
        self.message = message


class CannotPack(ValueError):
    """A base that packed trials would compute otherwise than its own code does; solo it can be trained."""


def seal(checkpoint: Path) -> None:
    """List a checkpoint's files and sizes in it, so that a copy cut short can be told from a whole one."""
    (checkpoint / _SEAL).write_text(json.dumps(_sizes(checkpoint)), encoding="utf-8")


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that ``seal`` listed is there in full."""
    try:
        return json.loads((checkpoint / _SEAL).read_text(encoding="utf-8")) == _sizes(checkpoint)
    except (OSError, json.JSONDecodeError):
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Ray adds hidden files of its own; they do not count."""
    files = [file for file in checkpoint.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in files if file.name != _SEAL}


def steps_per_epoch(examples: int, batch: int) -> int:
    return math.ceil(examples / batch)


def evaluation_steps(steps_an_epoch: int, epochs: float, evals_per_epoch: int) -> list[int]:
    """The trial's own optimizer steps after which it evaluates: evenly over each epoch, and after the last step.

    An evaluation never comes before its share of the epoch is trained, so that a rung at whole epochs sees it.
    """
    total = max(1, math.ceil(steps_an_epoch * epochs))
    evenly = {
        math.ceil(k * steps_an_epoch / evals_per_epoch) for k in range(1, math.ceil(epochs * evals_per_epoch) + 1)
    }
    return sorted({step for step in evenly if step < total} | {total})


def shared_step(epoch: float, examples: int, reference_batch: int) -> int:
    """A trial's epoch as a step of the shared axis."""
    return round(epoch * steps_per_epoch(examples, reference_batch))
