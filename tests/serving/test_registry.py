from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from serving import registry
from serving.__main__ import main


def put(home: Path, weights: str, model: str = "tickets") -> registry.ModelVersion:
    with registry.staging(model) as staged:
        (staged / "model.safetensors").write_text(weights)
        return registry.register(model, staged, {"serving": {}, "run_id": weights})


def test_a_version_is_named_by_its_content_and_never_changes(home: Path) -> None:
    first, again, other = put(home, "one"), put(home, "one"), put(home, "two")
    assert first.version == again.version != other.version
    assert again.record["run_id"] == "one"
    assert set(registry.versions("tickets")) == {first.version, other.version}
    for file in first.path.iterdir():
        assert not file.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH), file


def test_nothing_is_left_of_a_version_that_was_not_registered(home: Path) -> None:
    with registry.staging("tickets") as staged:
        (staged / "model.safetensors").write_text("half")
    assert list(registry.paths.model_dir("tickets").iterdir()) == []
    assert registry.versions("tickets") == []


def test_production_leaves_a_previous_and_a_history(home: Path) -> None:
    first, second = put(home, "one"), put(home, "two")
    registry.set_alias("tickets", "production", first.version, "run a")
    registry.set_alias("tickets", "production", second.version, "run b")
    assert registry.aliases("tickets") == {"production": second.version, "previous": first.version}
    lines = (registry.paths.model_dir("tickets") / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["before"] for line in lines] == [None, first.version]
    assert [json.loads(line)["reason"] for line in lines] == ["run a", "run b"]


def test_a_reference_names_production_a_version_or_an_alias(home: Path) -> None:
    first, second = put(home, "one"), put(home, "two")
    registry.set_alias("tickets", "production", second.version, "test")
    assert registry.find("tickets") == second
    assert registry.find(f"tickets@{first.version}") == first
    assert registry.find("tickets@production") == second


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("invoices", ["no model 'invoices'", "tickets"]),
        ("tickets@v000", ["no version or alias 'v000'"]),
        ("../tickets", ["a model's name", "'../tickets'"]),
        ("tickets@../x", ["a model's version"]),
        ("a/b", ["a model's name"]),
    ],
)
def test_what_is_not_registered_is_one_line_and_status_2(home: Path, reference: str, words: list, capsys) -> None:
    put(home, "one")
    assert main(["deploy", reference]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_models_are_listed_for_people_and_programs(home: Path, capsys) -> None:
    version = put(home, "one")
    registry.set_alias("tickets", "production", version.version, "test")
    assert main(["models", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["models"]["tickets"] == {
        "versions": [version.version],
        "aliases": {"production": version.version},
    }
    assert f"tickets@{version.version}  production" in err
