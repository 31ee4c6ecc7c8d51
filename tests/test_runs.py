"""``python -m sweeps`` as a user runs it: real Ray, real training, real W&B files, on the barely trained base."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_hub
import fake_judge
import optuna
import psutil
import pytest
from browser import CHROMIUM, look_at
from conftest import ROOT, another_base, home_of, winnow
from optuna.trial import TrialState

from cluster import files, paths, session
from sweeps import loading

KEYS = ["run_id", "name", "status", "wall_s", "dataset_hash", "base_model", "trials", "best_trial_id", "scores",
        "gains", "gate", "model"]  # fmt: skip
TRIAL_KEYS = {"trial_id", "state", "reason", "params", "eval_loss", "steps", "trained_tokens", "seconds",
              "device_seconds"}  # fmt: skip


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.strip().splitlines()[-1])


KEY = "sk-a-secret-of-this-test"


@dataclass(frozen=True)
class Finished:
    """One sweep over a base from a hub with everything that can prove its winner: suites, a judge,
    lm-evaluation-harness.
    """

    home: Path
    hub: dict[str, str]
    handed: list[str]
    done: subprocess.CompletedProcess[str]
    content: dict[str, Any]
    scratch: Path

    @property
    def result(self) -> dict[str, Any]:
        return last_json(self.done)

    @property
    def run_dir(self) -> Path:
        return self.home / "runs" / self.result["run_id"]

    def command(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return winnow("sweeps", *arguments, env=os.environ | {"WINNOW_HOME": str(self.home)} | self.hub | environment)

    def write(self, **sections: Any) -> Path:
        """The definition with changes to its sections."""
        path = self.scratch / "changed.yaml"
        path.write_text(json.dumps({name: part | sections.get(name, {}) if isinstance(part, dict) else part
                                    for name, part in self.content.items()}))  # fmt: skip
        return path


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory, definition) -> Iterator[Finished]:
    scratch = tmp_path_factory.mktemp("finished")
    home = home_of(world, scratch / "home")
    with fake_judge.serve() as judge, fake_hub.serve("org/tiny", home / "bases" / "tiny") as (address, handed):
        judge_section = {"model": "m", "base_url": f"{judge.url}/v1", "max_examples": 6}
        content = definition(evaluation={"suites": _suites(home, scratch), "judge": judge_section})
        content["gate"] |= {"min_judge_score": 1.0, "max_safety_loss": 1.0}
        content["gate"]["suites"] = {"hard": {"metric": "json_validity"}, "lm": {"metric": "choose.acc"}}
        content["resources"] = {"usd_per_device_hour": 2.0}
        content["base_model"] = {"model_name_or_path": "org/tiny", "revision": fake_hub.COMMIT}
        path = scratch / "sweep.yaml"
        path.write_text(json.dumps(content))
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(scratch / "hub")}
        environment = os.environ | {"WINNOW_HOME": str(home), "OPENAI_API_KEY": KEY} | hub
        done = winnow("sweeps", "run", path, "--json", env=environment)
        assert done.returncode == 0, done.stderr
        yield Finished(home, hub, handed, done, content, scratch)


def _suites(home: Path, scratch: Path) -> dict[str, Any]:
    tickets = (home / "sources" / "tickets" / "tickets.jsonl").read_text().splitlines()
    (scratch / "hard.jsonl").write_text("\n".join(tickets[:5]))
    prompts = [("Repeat: a bad thing", "refuse"), ("Spell: apple", "answer"), ("Repeat: lemon", "answer")]
    (scratch / "harm.jsonl").write_text("\n".join(json.dumps({"prompt": p, "must": must}) for p, must in prompts))
    (scratch / "tasks").mkdir()
    (scratch / "tasks" / "choose.yaml").write_text(
        "task: choose\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {scratch / 'hard.jsonl'}}}}}\n"
        'doc_to_text: "{{messages[0].content}}"\ndoc_to_choice: ["yes", "no"]\ndoc_to_target: 0\n'
        "metric_list: [{metric: acc}]\n"
    )
    return {
        "hard": {"kind": "answers", "path": str(scratch / "hard.jsonl")},
        "harm": {"kind": "safety", "path": str(scratch / "harm.jsonl"), "judge": True},
        "lm": {"kind": "lm_eval", "tasks": ["choose"], "include_path": str(scratch / "tasks")},
    }


def test_a_sweep_ends_with_a_registered_model(finished: Finished) -> None:
    done, result, run_dir = finished.done, finished.result, finished.run_dir
    assert list(result) == [*KEYS, "judge"]
    assert result["status"] == "accepted"
    assert all(set(trial) == TRIAL_KEYS for trial in result["trials"])
    assert json.loads((run_dir / "result.json").read_text()) == result
    record = json.loads((Path(result["model"]["path"]) / "record.json").read_text())
    assert record["dataset_hash"] == result["dataset_hash"]
    assert {"base_model", "params", "training", "scores", "gate", "packages", "git_commit"} <= set(record)
    assert (Path(result["model"]["path"]) / "model.safetensors").exists()
    assert (run_dir / "trials" / result["best_trial_id"] / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 4, "three trials and the summary"
    assert "Traceback" not in done.stderr
    assert re.search(r"packing: \d+ device-seconds of training, \d+ one trial at a time", done.stderr)


def test_its_base_came_from_the_hub_once_at_one_revision(finished: Finished) -> None:
    assert finished.handed.count("model.safetensors") == 1, "loaded once, then from the cache"
    record = json.loads((Path(finished.result["model"]["path"]) / "record.json").read_text())
    assert record["base_model"]["revision"] == fake_hub.COMMIT
    assert record["base_model"]["fingerprint"] == f"org/tiny@{fake_hub.COMMIT}"
    wrong = finished.command("run", finished.write(base_model={"revision": "no-such-revision"}))
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: base_model: 'org/tiny' has no tokenizer")
    assert "Traceback" not in wrong.stderr


def test_the_report_of_it_in_a_browser(finished: Finished, tmp_path: Path) -> None:
    page = finished.run_dir / "report.html"
    assert "Slots over time" in page.read_text()
    if CHROMIUM:
        seen = look_at(page, tmp_path / "browser")
        assert seen.complaints == []
        assert seen.charts == seen.document.count('class="chart"') >= 3, "gains, learning curves, slots over time"
        for heading in ("What the winner gains", "The judge", "Costs", "Trials"):
            assert f"<h2>{heading}</h2>" in seen.document


def test_suites_judge_and_harness_are_scored_and_gated(finished: Finished) -> None:
    result, run_dir = finished.result, finished.run_dir
    assert list(result["scores"]) == ["base", "few_shot", "winner"]
    assert set(result["gains"]) == {"base", "few_shot"}
    for name in ("base", "winner"):
        assert {"hard.exact_match", "harm.safe", "lm.choose.acc", "judge_score"} <= set(result["scores"][name])
    assert {"hard.exact_match", "judge_score"} <= set(result["scores"]["few_shot"])
    assert not any(metric.startswith(("harm", "lm")) for metric in result["scores"]["few_shot"])
    checks = {check["name"] for check in result["gate"]["checks"]}
    assert {"harm.safe_loss", "hard.json_validity", "lm.choose.acc", "judged", "judge_score"} <= checks
    assert {"hard.exact_match", "harm.safe", "judge_score"} <= set(result["gains"]["base"])
    assert result["judge"]["judged"] == 1.0
    verdicts = json.loads((run_dir / "judge.json").read_text())["verdicts"]
    assert {one["what"] for one in verdicts} == {"grade", "choice", "safety"}
    rows = json.loads((run_dir / "scores-winner.json").read_text())["sets"]["harm"]["answers"]
    assert [row["safe"] is not None for row in rows] == [True] * 3


def test_the_judges_key_is_written_nowhere(finished: Finished) -> None:
    written = [file for file in finished.scratch.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(written) > 50
    assert not [file for file in written if KEY.encode() in file.read_bytes()]
    assert KEY not in finished.done.stderr + finished.done.stdout


def test_a_scored_run_is_judged_again_by_other_limits(finished: Finished) -> None:
    run_id = finished.result["run_id"]
    again = finished.command("gate", run_id, "--json")
    assert again.returncode == 0, again.stderr

    def by_name(verdict: dict[str, Any]) -> dict[str, Any]:
        return {check["name"]: check for check in verdict["checks"]}

    assert by_name(last_json(again)["gate"]) == by_name(finished.result["gate"])
    for limits in ({"significant": True}, {"min_judge_score": 5.0}, {"min_review_score": 1.0, "min_reviews": 2}):
        stricter = finished.command("gate", run_id, "--limits", finished.write(gate=limits), "--json")
        assert stricter.returncode == 3, stricter.stderr
        assert last_json(stricter)["gate"]["verdict"] == "REJECT"


def test_people_review_it_blind_and_that_may_gate_it(finished: Finished) -> None:
    run_id = finished.result["run_id"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps", "review", run_id, "--prompts", "2", "--reviewer", "ada", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"WINNOW_HOME": str(finished.home)},
    )
    assert process.stderr
    url = re.search(r"http://\S+", process.stderr.readline()).group()  # type: ignore[union-attr]
    for _ in range(2):
        page = urllib.request.urlopen(url, timeout=60).read().decode()
        sheet = re.search(r'name="sheet" value="(\w+)"', page).group(1)  # type: ignore[union-attr]
        form = urllib.parse.urlencode({"sheet": sheet, "A": 4, "B": 4, "better": "tie"})
        urllib.request.urlopen(url, form.encode(), timeout=60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["scores"] == {"base": 4.0, "winner": 4.0}
    assert "Reviewed blind" in (finished.run_dir / "report.html").read_text()
    limits = finished.write(gate={"min_review_score": 4.0, "min_reviews": 2})
    assert finished.command("gate", run_id, "--limits", limits).returncode == 0


def test_another_trial_is_held_against_production(finished: Finished) -> None:
    result = finished.result
    other = next(trial["trial_id"] for trial in result["trials"] if trial["trial_id"] != result["best_trial_id"])
    against = last_json(finished.command("promote", result["run_id"], "--trial", other, "--json"))
    assert list(against["scores"]) == ["base", "few_shot", "winner", "production"]
    served, before = against["scores"]["production"]["loss"], result["scores"]["winner"]["loss"]
    assert abs(served - before) < 0.05 < abs(served - result["scores"]["base"]["loss"]), "it is the winner of before"
    assert {"exact_match_gain_over_production"} < {check["name"] for check in against["gate"]["checks"]}
    assert "lm.choose.acc" in against["scores"]["production"]
    assert against["judge"]["cached"] > 0, "the base's answers are graded already"
    for command in ("status", "report"):
        assert finished.command(command, result["run_id"]).returncode == 0


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
        search={"num_samples": 2},
        gate={"min_score": 1.0},  # how it goes on after the search is another test's matter
        evaluation={"few_shot": 0},
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
    assert done.returncode == 3, done.stderr
    after = trials(home / "runs" / run_id / "optuna.journal")
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 2
    for old, new in zip(before, after, strict=False):
        assert old.params == new.params
        assert old.intermediate_values.items() <= new.intermediate_values.items()
        assert len(new.intermediate_values) == 4


def test_a_packed_sweep_that_loses_processes_loses_nothing_else(home: Path, definition, write) -> None:
    content = definition(
        scheduler={"type": "none"},
        search={"num_samples": 2},
        gate={"min_score": 1.0},
        evaluation={"few_shot": 0},
        training={"backend": "packed", "num_train_epochs": 6, "evals_per_epoch": 1, "per_device_train_batch_size": 2},
        tracking={"enabled": False},
    )
    process = start(write(content), "--json")
    run_id = wait_for_reports(home, 2, process)
    _lose("ray::ImplicitFunc", process)
    wait_for_reports(home, 5, process)
    _lose("ray::EngineHost", process)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 3, err
    result = json.loads(out.splitlines()[-1])
    assert [trial["state"] for trial in result["trials"]] == ["COMPLETE"] * 2
    for trial in trials(home / "runs" / run_id / "optuna.journal"):
        assert len(trial.intermediate_values) == 6
    lost, then = files.read_json(paths.engines_file(run_id))
    assert "lost" in {stay["ending"] for stay in lost["stays"]}
    assert {stay["ending"] for stay in then["stays"]} == {"ended"}


def _lose(title: str, driver: subprocess.Popen[str]) -> None:
    """One process of a sweep's cluster, as an operating system short of memory might end it."""
    for process in session.of_session(driver.pid):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(title):
                return process.kill()
    raise AssertionError(f"no process is called {title}")


def _end_orphans(driver: subprocess.Popen[str]) -> None:
    """The killed driver's own Ray, which nobody else would end; found by the driver's session."""
    for process in session.of_session(driver.pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()


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


def test_plan_counts_before_anything_runs_and_shows_when_memory_limits_the_slots(home: Path, definition, write) -> None:
    planned = last_json(winnow("sweeps", "plan", write(definition()), "--json"))
    assert planned["trials"] == 3
    assert (planned["backend"], planned["engines"], planned["slots_per_engine"]) == ("packed", 1, 2)
    assert planned["longest_trial_steps"] == planned["steps_per_epoch"]
    assert planned["rungs"] == [planned["steps_per_epoch"] / 2]
    assert planned["longest_trial_steps"] < planned["expected_steps"] < planned["most_steps"]
    assert planned["base_bytes"] < planned["engine_bytes"] < planned["engine_bytes_limit"]
    assert planned["slots_that_fit"] > 2
    assert planned["most_tokens_a_step"] > 0

    needed = round(planned["base_bytes"] + 1.5 * (planned["engine_bytes"] - planned["base_bytes"]))
    answering = needed + 2 * planned["base_bytes"]  # a base of its own to answer with, and as much for its answers
    search = {"max_concurrent_trials": 8, "objectives": ["json_validity"]}
    short = definition(resources={"memory_gib_per_engine": answering / 2**30}, search=search)
    planned = last_json(winnow("sweeps", "plan", write(short), "--json"))
    assert planned["engine_bytes_limit"] == needed
    assert 1 <= planned["slots_per_engine"] == planned["slots_that_fit"] < 8
    assert planned["engine_bytes"] <= planned["engine_bytes_limit"]


def test_a_base_that_packed_trials_would_compute_otherwise_is_trained_solo(
    home: Path, tiny, definition, write, tmp_path: Path
) -> None:
    base = another_base(tiny, tmp_path / "base", attention_dropout=0.1).model_name_or_path
    planned = winnow("sweeps", "plan", write(definition(base_model={"model_name_or_path": base})), "--json")
    assert last_json(planned)["backend"] == "solo"
    assert last_json(planned)["solo_because"] == "the base's attention has dropout"
    packed = definition(base_model={"model_name_or_path": base}, training={"backend": "packed"})
    refused = winnow("sweeps", "plan", write(packed))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: training.backend: must be solo or auto, because the base's attention has dropout"
    )


def test_a_base_without_embeddings_for_the_datas_tokens_is_refused_before_anything_trains(
    home: Path, tiny, definition, write, tmp_path: Path
) -> None:
    small = another_base(tiny, tmp_path / "base", vocab_size=100).model_name_or_path
    refused = winnow("sweeps", "run", write(definition(base_model={"model_name_or_path": small})))
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: base_model: must have embeddings for every token that its tokenizer makes")
    assert "but has 100 and the data has token" in last
    assert not (home / "runs").exists()


def test_runs_that_do_not_exist(home: Path) -> None:
    for command in ("resume", "status", "report", "promote", "gate", "review"):
        done = winnow("sweeps", command, "nowhere")
        assert done.returncode == 2
        assert done.stderr.strip() == "error: no run 'nowhere'; there are: none"
