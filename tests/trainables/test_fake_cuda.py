"""The engine on a GPU that has no numbers: devices, shapes, types, and what it waits for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from conftest import another_base

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for a GPU, and brings its own guard"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for a device's guard"),
]


@pytest.fixture(scope="module")
def seen(tiny, tmp_path_factory) -> dict[str, Any]:
    """Of two steps of mixed trials, the second one followed by an evaluation."""
    scratch = tmp_path_factory.mktemp("fake")
    base = another_base(tiny, scratch / "base", num_hidden_layers=2)
    done = subprocess.run(
        [sys.executable, str(Path(fake_cuda.__file__)), base.model_name_or_path],
        env=fake_cuda.environment(scratch),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_that_a_pass_needs_is_on_the_device(seen) -> None:
    assert seen["events"] == ["evaluated"] * len(fake_cuda.TRIALS)
    passes = [(step["evaluated"], step["passes"]) for step in seen["steps"]]
    assert passes == [(False, 2), (True, 2 + 2)], "nobody by itself"


def test_a_step_waits_once_and_an_evaluation_once(seen) -> None:
    first, second = (step["waits"] for step in seen["steps"])
    assert first == {"tolist in engine.learn": 1}
    assert second == first | {"tolist in engine.evaluate": 1}
