"""Sweeps as Ray jobs on a head node with token authentication."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, another_base, winnow

from cluster import files, session


@pytest.fixture
def dashboard(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head node's address for jobs. ``WINNOW_HOME`` is the cluster's storage, as its nodes have it."""
    from ray._common.network_utils import find_free_port

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    port = find_free_port()
    head = session.start_head(tmp_path / "ray.log", dashboard_port=port)
    yield f"http://127.0.0.1:{port}"
    from ray._common.utils import get_ray_address_file

    head.stop()
    assert not head.is_alive()
    note = ""
    with suppress(FileNotFoundError):
        note = Path(get_ray_address_file(None)).read_text().strip()
    assert note.rpartition(":")[2] != head.address.rpartition(":")[2], "every later ray.init() would look for this node"


@pytest.fixture
def in_working_dir(definition) -> Iterator:
    """Definitions have to lie in the directory that a job is sent; these go again."""
    written = []

    def write(name: str, **sections) -> Path:
        path = ROOT / "sweeps" / "definitions" / f".{name}.yaml"
        path.write_text(json.dumps(definition(**sections)))
        written.append(path)
        return path.relative_to(ROOT)

    yield write
    for path in written:
        path.unlink()


def test_both_ways_to_submit_do_the_whole_search(
    dashboard: str, home: Path, tiny, in_working_dir, all_formats, tmp_path: Path
) -> None:
    """And both backends one by several objectives, over data of every format; one base cannot be shared."""
    base = another_base(tiny, tmp_path / "base", attention_dropout=0.1)
    rejected = in_working_dir(
        "rejected",
        base_model={"model_name_or_path": base.model_name_or_path},
        data={"sources": all_formats},
        gate={"min_score": 1.0},
        search={"num_samples": 1, "objectives": ["json_validity", "trained_tokens"], "objective_prompts": 10},
        tracking={"enabled": False},
        evaluation={"few_shot": 0},
    )
    small = in_working_dir(
        "small",
        data={"sources": all_formats},
        search={"num_samples": 2, "objectives": ["field_accuracy", "answer_tokens"], "objective_prompts": 10},
        tracking={"enabled": False},
    )
    with ThreadPoolExecutor() as pool:  # two jobs on one cluster at once, as jobs are
        ours = pool.submit(winnow, "sweeps", "submit", rejected, "--address", dashboard, "--json")
        job, done = _by_ray(dashboard, small), ours.result()
    assert done.returncode == 3, f"the run's own exit status; {done.stderr}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["status"], result["gate"]["verdict"], result["model"]) == ("rejected", "REJECT", None)
    (trial,) = result["trials"]
    assert trial["objectives"] == {"json_validity": 0.0, "trained_tokens": trial["trained_tokens"]}
    assert "by json_validity, trained_tokens; no trial is stopped early" in done.stderr, "the log is streamed"
    assert "search: solo after all, because the base's attention has dropout" in done.stderr
    assert job.returncode == 0, job.stdout + job.stderr
    (accepted,) = (run for run in map(files.read_json, home.glob("runs/*/result.json")) if run["status"] == "accepted")
    for trial in accepted["trials"]:
        assert set(trial["objectives"]) == {"field_accuracy", "answer_tokens"}
        assert 0 < trial["objectives"]["answer_tokens"] <= 8, "max_new_tokens"
    registered = [path.parent.name for path in home.glob("registry/*/*/record.json")]
    assert registered == [accepted["model"]["version"]], "what is rejected is not there"
    token = session.AUTH_TOKEN.expanduser()
    assert token.stat().st_mode & 0o077 == 0


def _by_ray(dashboard: str, definition: Path) -> subprocess.CompletedProcess[str]:
    """``ray job submit``, as a user gives it."""
    command = [session.ray_command(), "job", "submit", "--address", dashboard, "--working-dir", ".", "--"]
    return subprocess.run(
        [*command, "python", "-m", "sweeps", "run", str(definition), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"RAY_ADDRESS": dashboard},
    )


def test_without_waiting_it_names_the_job(dashboard: str, in_working_dir) -> None:
    wrong = in_working_dir("wrong", data={"sources": [{"path": "nowhere.jsonl"}]})
    done = winnow("sweeps", "submit", wrong, "--address", dashboard, "--no-wait", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["job_id"]


def test_an_address_where_nothing_answers(home: Path, in_working_dir) -> None:
    done = winnow("sweeps", "submit", in_working_dir("unsent"), "--address", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "nothing answers" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
