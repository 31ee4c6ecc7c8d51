"""Trials without training, for tests of the search: what one does follows from its learning rate's place."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Checkpoint


def toy_trial(config: dict[str, Any], definition: Any, dataset: str, resume_from: dict[str, str]) -> None:
    """Eight steps of falling loss. ``r`` chooses what goes wrong: 1 NaN, 2 no loss, 3 raises, 4 dies once, 5 nothing
    reported, 6 out of memory, 7 tells of its process; 8 and up nothing. 20 is at a rung with its engine's others first,
    and reports no more until 21 has come there too. Higher learning rates end lower.
    """
    r, start = config["r"], _start(resume_from.get(config["trial_id"]))
    time.sleep(0.3)
    if r == 3:
        raise ZeroDivisionError("a bug in the user's data")
    if r == 5:
        return
    if r == 6:
        tune.report({"failure_reason": "oom", "failure_message": "CUDA out of memory"})
        return
    if r == 7:
        tune.report({"failure_reason": "error", "failure_message": ray.get_runtime_context().get_runtime_env_string()})
        return
    shared = Path(tune.get_context().get_trial_dir()).parent
    _wait_for(shared / "passed", r == 21)
    for step in range(start + 1, 9):
        if r == 4 and step == 5 and start == 0:
            os._exit(1)
        loss: float | None = 3.0 / step - config["learning_rate"]
        if r == 1 and step == 2:
            loss = float("nan")
        _report(step, loss, with_loss=r != 2, beside=r in (20, 21))
        if r in (20, 21) and step == 2:  # its report is judged
            (shared / {20: "passed", 21: "outdone"}[r]).touch()
            _wait_for(shared / "outdone", r == 20)


def _wait_for(file: Path, needed: bool) -> None:
    deadline = time.monotonic() + 60
    while needed and not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _start(handed: str | None) -> int:
    retried = tune.get_checkpoint()
    path = retried.path if retried else handed
    return json.loads((Path(path) / "state.json").read_text())["step"] if path else 0


def _report(step: int, loss: float | None, with_loss: bool, beside: bool) -> None:
    from trainables.contract import Peer, seal

    facts: dict[str, Any] = {"step": step, "epoch": step / 4, "trained_tokens": 100 * step}
    facts |= {"seconds": 0.1 * step, "device_seconds": 0.1 * step}
    if beside:
        facts |= {"peers": (Peer("another", 0, 9.9),), "last": False}
    if with_loss:
        facts["eval_loss"] = loss
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "adapter").mkdir()
        (Path(scratch) / "adapter" / "adapter_config.json").write_text("{}")
        (Path(scratch) / "state.json").write_text(json.dumps({"step": step}))
        seal(Path(scratch))
        tune.report(facts, checkpoint=Checkpoint.from_directory(scratch))
