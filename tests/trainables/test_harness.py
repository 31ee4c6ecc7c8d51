"""lm-evaluation-harness on a task file of the user's own: on a model here, and over HTTP."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import fake_judge
import pytest

from sweeps.__main__ import main
from trainables import harness
from trainables.generation import Model
from trainables.spec import BaseModelSpec, HarnessSuite

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "Repeat: {{{{word}}}}"
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """``choose`` compares the likelihoods of two answers, ``say`` generates one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"word": word, "ok": "ok"}) for word in ("lemon", "apple", "lemon")))
    choose = _TASK.format(name="choose", rows=rows, output_type="multiple_choice")
    choose += 'doc_to_choice: ["lemon", "apple"]\ndoc_to_target: "{{word}}"\nmetric_list: [{metric: acc}]\n'
    say = _TASK.format(name="say", rows=rows, output_type="generate_until")
    say += 'doc_to_target: "{{ok}}"\nmetric_list: [{metric: exact_match}]\ngeneration_kwargs: {max_gen_toks: 4}\n'
    for name, text in (("choose", choose), ("say", say)):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path / "tasks"


def suite(tasks: Path, *names: str, **fields) -> HarnessSuite:
    return HarnessSuite(kind="lm_eval", tasks=names, include_path=str(tasks), **fields)


def test_metrics_of_a_model_are_called_by_task_and_metric(home: Path, tasks: Path) -> None:
    base = Model(BaseModelSpec(model_name_or_path=str(home / "bases" / "tiny")))
    asked = suite(tasks, "choose", "say", limit=2)
    harness.check(asked, "harness")
    found = harness.score(asked, base, 2)
    assert set(found) == {"choose.acc", "say.exact_match"}
    assert found["choose.acc"] in (0.0, 0.5, 1.0), "of two documents"
    assert found["say.exact_match"] == 0.0


def test_an_endpoint_over_http_by_the_command(home: Path, tasks: Path, capsys) -> None:
    def command(address: str, *more: str) -> int:
        return main(["harness", address, "--include-path", str(tasks), "--json", *more])

    with fake_judge.serve() as endpoint:
        assert command(f"{endpoint.url}/v1", "--model", "m", "--tasks", "say") == 0
        assert json.loads(capsys.readouterr().out)["metrics"] == {"say.exact_match": 1.0}
        asked = {one["messages"][0]["content"] for one in endpoint.requests}
        assert asked == {"Repeat: lemon", "Repeat: apple"}
        assert command(f"{endpoint.url}/v1", "--tasks", "say") == 2
        assert "--model: required for an endpoint" in capsys.readouterr().err
        assert command(f"{endpoint.url}/v1", "--model", "m", "--tasks", "choose") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: --tasks: a chat endpoint can only generate: ")
        assert command("nobody", "--tasks", "say") == 2
        assert "no model 'nobody' is registered" in capsys.readouterr().err


def test_a_task_or_a_directory_that_is_not_there(tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"suites\.lm\.tasks: 'nothing' is no task of .*, nor of '"):
        harness.check(suite(tasks, "choose", "nothing"), "suites.lm")
    with pytest.raises(ValueError, match=r"suites\.lm\.include_path: no such directory"):
        harness.check(suite(tasks / "nowhere", "choose"), "suites.lm")


def test_without_the_library_one_line_says_how_to_get_it(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ValueError, match=r"suites\.lm: kind lm_eval needs .*: bash scripts/install\.sh --lm-eval"):
        harness.check(suite(tasks, "choose"), "suites.lm")
