"""``python -m sweeps`` as a user runs it: real Ray, real training, real W&B files, on the barely trained base."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from browser import CHROMIUM, look_at
from conftest import ROOT, winnow
from optuna.trial import TrialState

from cluster import files, paths
from sweeps import loading

KEYS = ["run_id", "name", "status", "wall_s", "dataset_hash", "base_model", "trials", "best_trial_id", "scores",
        "gains", "gate", "model"]  # fmt: skip
TRIAL_KEYS = {"trial_id", "state", "reason", "params", "eval_loss", "steps", "trained_tokens", "seconds",
              "device_seconds"}  # fmt: skip


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_sweep_ends_with_a_registered_model(home: Path, definition, write, tmp_path: Path) -> None:
    done = winnow("sweeps", "run", write(definition()), "--json")
    assert done.returncode == 0, done.stderr
    result = last_json(done)
    assert list(result) == KEYS
    assert result["status"] == "accepted"
    assert all(set(trial) == TRIAL_KEYS for trial in result["trials"])
    run_dir = home / "runs" / result["run_id"]
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert "Slots over time" in (run_dir / "report.html").read_text()
    if CHROMIUM:
        seen = look_at(run_dir / "report.html", tmp_path / "browser")
        assert seen.complaints == []
        assert seen.charts == seen.document.count('class="chart"') >= 3, "gains, learning curves, slots over time"
    record = json.loads((Path(result["model"]["path"]) / "record.json").read_text())
    assert record["dataset_hash"] == result["dataset_hash"]
    assert {"base_model", "params", "training", "scores", "gate", "packages", "git_commit"} <= set(record)
    assert (Path(result["model"]["path"]) / "model.safetensors").exists()
    assert (run_dir / "trials" / result["best_trial_id"] / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 4, "three trials and the summary"
    assert "Traceback" not in done.stderr
    assert re.search(r"packing: \d+ device-seconds of training, \d+ one trial at a time", done.stderr)
    assert list(result["scores"]) == ["base", "few_shot", "winner"]
    assert set(result["gains"]) == {"base", "few_shot"}
    again = winnow("sweeps", "gate", result["run_id"], "--json")
    assert (again.returncode, last_json(again)["gate"]) == (0, result["gate"])
    stricter = winnow(
        "sweeps", "gate", result["run_id"], "--limits", write(definition(gate={"significant": True})), "--json"
    )
    assert stricter.returncode == 3, stricter.stderr
    assert last_json(stricter)["gate"]["verdict"] == "REJECT"
    promoted = winnow("sweeps", "promote", result["run_id"], "--json")
    assert last_json(promoted)["model"]["version"] == result["model"]["version"]
    other = next(trial["trial_id"] for trial in result["trials"] if trial["trial_id"] != result["best_trial_id"])
    against = last_json(winnow("sweeps", "promote", result["run_id"], "--trial", other, "--json"))
    assert list(against["scores"]) == ["base", "few_shot", "winner", "production"]
    served, before = against["scores"]["production"]["loss"], result["scores"]["winner"]["loss"]
    assert abs(served - before) < 0.05 < abs(served - result["scores"]["base"]["loss"]), "it is the winner of before"
    assert {"exact_match_gain_over_production"} < {check["name"] for check in against["gate"]["checks"]}
    for command in ("status", "report"):
        assert winnow("sweeps", command, result["run_id"]).returncode == 0


def test_the_gate_rejects_with_status_3_and_registers_nothing(home: Path, definition, all_formats, write) -> None:
    content = definition(
        data={"sources": all_formats},
        gate={"min_score": 1.0},
        search={"num_samples": 1},
        tracking={"enabled": False},
        training={"backend": "solo"},
    )
    done = winnow("sweeps", "run", write(content), "--json")
    assert done.returncode == 3, done.stderr
    result = last_json(done)
    assert (result["status"], result["gate"]["verdict"], result["model"]) == ("rejected", "REJECT", None)
    assert not (home / "registry").exists()


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sweeps", "run", str(path), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_reports(home: Path, count: int, process: subprocess.Popen[str]) -> str:
    """Until ``count`` evaluations stand in the study; returns the run's id."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for journal in home.glob("runs/*/optuna.journal"):
            if sum(len(trial.intermediate_values) for trial in trials(journal)) >= count:
                return journal.parent.name
        time.sleep(0.3)
    raise TimeoutError("no trial reported in time")


def trials(journal: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    summaries = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summaries[0].study_name, storage=storage).trials if summaries else []


@pytest.mark.parametrize(
    ("how", "backend"),
    [(signal.SIGTERM, "solo"), (signal.SIGKILL, "packed")],
    ids=["SIGTERM-solo", "SIGKILL-packed"],
)
def test_an_interrupted_sweep_goes_on_and_loses_nothing(how, backend, home: Path, definition, write) -> None:
    content = definition(
        scheduler={"type": "none"},
        training={"backend": backend, "num_train_epochs": 2, "evals_per_epoch": 2, "per_device_train_batch_size": 4},
        tracking={"enabled": how == signal.SIGTERM},
    )
    process = start(write(content))
    run_id = wait_for_reports(home, 2, process)
    before = trials(home / "runs" / run_id / "optuna.journal")
    process.send_signal(how)
    _, err = process.communicate(timeout=90)
    if how == signal.SIGKILL:
        _end_orphans(process)
    else:
        assert process.returncode == 130, err
        assert err.strip().splitlines()[-1] == f"interrupted; go on with: python -m sweeps resume {run_id}"
        assert json.loads((home / "runs" / run_id / "result.json").read_text())["status"] == "interrupted"
    done = winnow("sweeps", "resume", run_id, "--json")
    assert done.returncode == 0, done.stderr
    after = trials(home / "runs" / run_id / "optuna.journal")
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 3
    for old, new in zip(before, after, strict=False):
        assert old.params == new.params
        assert old.intermediate_values.items() <= new.intermediate_values.items()
        assert len(new.intermediate_values) == 4


def _end_orphans(driver: subprocess.Popen[str]) -> None:
    """The killed driver's own Ray, which nobody else would end; found by the driver's session."""
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == driver.pid:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


def test_bad_data_stops_before_a_run_exists(home: Path, definition, write, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    done = winnow("sweeps", "run", write(definition(data={"sources": [{"path": str(bad)}]})), "--json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: data: 1 rows have a value that their format does not take (bad.jsonl 1); ")
    assert "bad.jsonl:1: messages[0].role must be one of system, user, assistant, but got 'robot'" in last
    assert not (home / "runs").exists()


def test_a_run_does_not_go_on_with_other_data(home: Path, definition) -> None:
    run_id = "smoke-began-elsewhere"
    begun = loading.parse(definition(), "sweep.yaml").model_dump(mode="json")
    files.write_json(paths.sweep_file(run_id), begun)
    files.write_json(paths.dataset_file(run_id), {"dataset_hash": "0123456789abcdef"})
    done = winnow("sweeps", "resume", run_id)
    assert done.returncode == 2
    assert f"error: data: run '{run_id}' began with snapshot 0123456789abcdef, but its" in done.stderr.splitlines()[-1]


def test_more_gpus_than_there_are(home: Path, definition, write) -> None:
    done = winnow("sweeps", "run", write(definition(resources={"gpus_per_trial": 2})))
    assert done.returncode == 2
    assert "wants 2 GPU" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (home / "runs").exists()


def test_plan_counts_before_anything_runs(home: Path, definition, write) -> None:
    planned = last_json(winnow("sweeps", "plan", write(definition()), "--json"))
    assert planned["trials"] == 3
    assert (planned["backend"], planned["engines"], planned["slots_per_engine"]) == ("packed", 1, 2)
    assert planned["longest_trial_steps"] == planned["steps_per_epoch"]
    assert planned["rungs"] == [planned["steps_per_epoch"] / 2]
    assert planned["longest_trial_steps"] < planned["expected_steps"] < planned["most_steps"]
    assert planned["base_bytes"] < planned["engine_bytes"] < planned["engine_bytes_limit"]
    assert planned["slots_that_fit"] > 2
    assert planned["most_tokens_a_step"] > 0


def test_plan_shows_when_memory_limits_the_slots(home: Path, definition, write) -> None:
    room = last_json(winnow("sweeps", "plan", write(definition()), "--json"))
    needed = room["base_bytes"] + 1.5 * (room["engine_bytes"] - room["base_bytes"])
    short = definition(resources={"memory_gib_per_engine": needed / 2**30}, search={"max_concurrent_trials": 8})
    planned = last_json(winnow("sweeps", "plan", write(short), "--json"))
    assert 1 <= planned["slots_per_engine"] == planned["slots_that_fit"] < 8
    assert planned["engine_bytes"] <= planned["engine_bytes_limit"]


def test_runs_that_do_not_exist(home: Path) -> None:
    for command in ("resume", "status", "report", "promote", "gate"):
        done = winnow("sweeps", command, "nowhere")
        assert done.returncode == 2
        assert done.stderr.strip() == "error: no run 'nowhere'; there are: none"
