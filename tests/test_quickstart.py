"""The main job: ``scripts/quickstart.sh`` from nothing to a served model that answers, with the learning real."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ROOT, script, winnow
from optuna.trial import TrialState
from test_runs import trials

from serving.spec import LimitsSpec

pytestmark = pytest.mark.timeout(1800)
"""The first test waits for all of the quickstart, which a slow machine takes a quarter of an hour for."""
TICKET = "Ticket: Hello, My card shows two payments for one Pixel Printer. This is urgent. Thanks, Ada"


@pytest.fixture(scope="module")
def result(quickstart) -> dict[str, Any]:
    assert quickstart["done"].returncode == 0, quickstart["done"].stderr[-3000:]
    (file,) = quickstart["home"].glob("runs/*/result.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def client(quickstart, result) -> openai.OpenAI:
    return openai.OpenAI(base_url=quickstart["url"], api_key="unused")


def chat(text: str = TICKET) -> dict[str, Any]:
    return {
        "model": "tickets",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 96,
    }


def test_the_base_cannot_and_the_winner_can(result) -> None:
    assert result["status"] == "accepted"
    assert result["scores"]["base"]["exact_match"] < 0.10
    assert result["scores"]["winner"]["exact_match"] > 0.85
    assert result["scores"]["base"]["general_exact_match"] > 0.9


def test_its_last_lines_say_where_to_read_about_data_and_run(quickstart, result) -> None:
    lines = quickstart["done"].stderr.splitlines()
    (data,) = {line.removeprefix("data: ") for line in lines if re.fullmatch(r"data: .*\.html", line)}
    report = [line.removeprefix("report: ") for line in lines if line.startswith("report: ")][-1]
    assert Path(data).name == f"{result['dataset_hash']}.html"
    assert Path(report).parent.name == result["run_id"]
    assert Path(data).exists()
    assert Path(report).exists()


def test_trials_differ_and_poor_ones_are_pruned_in_both_records(quickstart, result) -> None:
    states = [trial["state"] for trial in result["trials"]]
    assert len(states) >= 12
    assert states.count("PRUNED") >= 1
    (journal,) = quickstart["home"].glob("runs/*/optuna.journal")
    assert sum(trial.state == TrialState.PRUNED for trial in trials(journal)) == states.count("PRUNED")
    losses = [trial["eval_loss"] for trial in result["trials"]]
    assert max(losses) > 10 * min(losses)


def test_it_says_what_it_does_and_prints_the_answers(quickstart, result) -> None:
    done = quickstart["done"]
    assert [line[3] for line in done.stderr.splitlines() if re.match(r"== \d/5", line)] == list("12345")
    assert done.stdout.count("[as expected]") >= 2


def test_the_curl_line_that_it_ends_with_gets_a_valid_ticket(quickstart, result) -> None:
    curl, stop = quickstart["done"].stderr.splitlines()[-2:]
    assert stop.endswith("-m serving stop")
    program, _, url, _, header, _, body = shlex.split(curl)
    assert (program, url) == ("curl", f"{quickstart['url']}/chat/completions")
    name, _, value = header.partition(": ")
    request = urllib.request.Request(url, body.encode(), {name: value})
    with urllib.request.urlopen(request, timeout=60) as response:
        ticket = json.loads(json.load(response)["choices"][0]["message"]["content"])
    assert ticket == {
        "category": "billing",
        "urgency": "high",
        "product": "Pixel Printer",
        "summary": "charged twice",
    }


def test_the_openai_client_on_every_route(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tickets"]
    whole = client.chat.completions.create(**chat()).choices[0].message.content
    pieces = list(client.chat.completions.create(**chat(), stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole
    assert len(pieces) > 5
    prompt = {"model": "tickets", "prompt": "<|bos|><|user|>Repeat: lemon<|end|><|assistant|>", "max_tokens": 4}
    text = client.completions.create(**prompt, temperature=0).choices[0].text
    streamed = client.completions.create(**prompt, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == text != ""
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat() | {"model": "unknown"})


def test_status_shows_what_runs(quickstart, result) -> None:
    done = winnow("serving", "status", "--json", env=quickstart["env"])
    (app,) = json.loads(done.stdout.splitlines()[-1])["applications"].values()
    assert app["version"] == result["model"]["version"]
    assert app["replicas"][app["version"]] == {"RUNNING": 1}
    assert app["url"] == quickstart["url"]


def test_serve_run_builds_the_application_with_limits_and_grace_on_server_and_ingress(quickstart, result) -> None:
    code = (
        "import json; from serving.app import build;"
        "from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as as_serve_run;"
        "ingress = as_serve_run(build, {'model': 'tickets'})._bound_deployment;"
        "server = ingress.init_kwargs['deployed'][1]._bound_deployment;"
        "limits = (ingress.max_ongoing_requests, ingress.max_queued_requests, server.max_ongoing_requests);"
        "grace = [one._deployment_config.graceful_shutdown_timeout_s for one in (ingress, server)];"
        "print(json.dumps([limits, grace]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=quickstart["env"], check=True
    )
    limits, grace = json.loads(done.stdout.splitlines()[-1])
    assert max(limits) < 1000
    assert min(limits) > 0
    assert min(grace) > LimitsSpec().body_timeout_s + LimitsSpec().timeout_s, "the longest answer is not cut"


def test_forgetting_is_refused(quickstart, result, tmp_path: Path) -> None:
    """Overtrained on purpose on a few tickets, without the general examples that keep the quickstart's own winner."""
    own = {check["name"]: check["passed"] for check in result["gate"]["checks"]}
    assert own["general_loss"]
    rows, home = tmp_path / "rows", tmp_path / "home"
    script("make_ticket_data.py", "--out", str(rows), "--rows", "400")
    home.mkdir()
    (home / "bases").symlink_to(quickstart["home"] / "bases")
    content = {
        "name": "forgetting",
        "base_model": {"model_name_or_path": "${WINNOW_HOME}/bases/tiny"},
        "data": {
            "sources": [{"path": str(rows / "tickets.jsonl")}],
            "general": str(rows / "general-test.jsonl"),
            "max_length": 256,
        },
        "search": {"num_samples": 1, "space": {"learning_rate": {"choices": [2e-3]}}},
        "training": {"r": 32, "num_train_epochs": 4, "evals_per_epoch": 1},
        "evaluation": {"max_new_tokens": 96, "batch_size": 64, "few_shot": 0},
        "gate": {"metric": "field_accuracy", "min_score": 0.2, "min_gain": 0.2, "min_merge_agreement": 0.5},
        "tracking": {"enabled": False},
    }
    (home / "sweep.yaml").write_text(json.dumps(content))
    done = winnow("sweeps", "run", home / "sweep.yaml", "--json", env=os.environ | {"WINNOW_HOME": str(home)})
    assert done.returncode == 3, done.stderr
    checks = json.loads(done.stdout.splitlines()[-1])["gate"]["checks"]
    failed = {check["name"]: check["value"] for check in checks if not check["passed"]}
    assert list(failed) == ["general_loss"], "it has learned its tickets all the same"
    assert failed["general_loss"] > 0.2
