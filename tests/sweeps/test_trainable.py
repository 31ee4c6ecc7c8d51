"""What a trial's process hands to Tune, with a backend that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeps import loading
from sweeps.search import trainable
from trainables.contract import ADAPTER, REPORT, Peer, Report

REPORTED = Report(0.5, 10, 1.0, 100, 0.6, 2.0, 1.0, 0.5, peers=(Peer("t0001", 10, 0.7),))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Everything that Tune was told."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable.tune, "report", lambda metrics, **_: told.append(metrics))
    monkeypatch.setattr(trainable.tune, "get_checkpoint", lambda: None)
    return told


@pytest.fixture
def run(definition, home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A trial whose backend makes these reports, from a checkpoint or from its start."""

    def start(*reports: Report, left: Path | None = None) -> None:
        def backend(config: Any, workdir: Path, resume_from: Path | None, report: Any) -> None:
            for made in reports:
                report(made, checkpoint(workdir / "made", made))

        monkeypatch.setattr(trainable, "_solo", lambda: backend)
        resume_from = {"t0000": str(left)} if left else {}
        trainable.train_trial({"trial_id": "t0000", "r": 8}, loading.parse(definition(), "test"), "", resume_from)

    return start


def checkpoint(directory: Path, report: Report) -> Path:
    (directory / ADAPTER).mkdir(parents=True)
    (directory / REPORT).write_text(json.dumps(report.as_dict()))
    return directory


def test_tune_is_told_the_report_and_its_peers(run, told) -> None:
    run(REPORTED)
    assert told == [REPORTED.as_dict() | {"peers": REPORTED.peers, "last": False}]
    assert not {"peers", "last"} & REPORTED.as_dict().keys()


def test_a_trial_that_had_ended_before_its_run_was_interrupted_tells_its_last_report(run, told, tmp_path: Path) -> None:
    run(left=checkpoint(tmp_path / "left", REPORTED))
    assert told == [REPORTED.as_dict()]


def test_a_trial_without_a_checkpoint_tells_nothing_before_it_trains(run, told) -> None:
    run()
    assert told == []
