from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving import registry
from serving.__main__ import main
from serving.traffic import Routes


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


def test_production_is_settled_on_what_serves(home: Path) -> None:
    first, second = put(home, "one"), put(home, "two")
    registry.set_alias("tickets", "production", first.version, "run a")
    registry.set_alias("tickets", "production", second.version, "run b")  # and nobody deployed it
    registry.settle("tickets", first.version, "it is what serves")
    settled = {"production": first.version, "served": first.version}
    assert registry.aliases("tickets") == settled, "the second one never was production"
    registry.settle("tickets", first.version, "again")
    assert [entry["reason"] for entry in registry.history("tickets")] == ["run a", "run b", "it is what serves"]
    registry.promote("tickets", second.version, "promote")
    promoted = {"production": second.version, "served": second.version, "previous": first.version}
    assert registry.aliases("tickets") == promoted


def test_sweeps_move_neither_the_traffic_nor_what_it_goes_back_to(home: Path) -> None:
    """However many of them are accepted; and one that is accepted again may be warm already."""
    first, second, *later = (put(home, name).version for name in ("one", "two", "three", "four"))
    registry.set_alias("tickets", "production", first, "run a")
    registry.set_served("tickets", first, was=None)
    registry.set_canary("tickets", second, 10, "canary")
    registry.promote("tickets", second, "promote")
    for accepted in (*later, first):
        registry.set_alias("tickets", "production", accepted, "a sweep")
        now = registry.aliases("tickets")
        assert (now["production"], now["served"], now["previous"]) == (accepted, second, first)
        routes = Routes((first, second), first, now)
        assert routes.choose("", "ada") == (second, "production")
        assert routes.choose("production", "ada") == (second, "direct")
    assert registry.roll_back("tickets", "worse") == first
    registry.set_served("tickets", later[0], was=first)
    assert registry.aliases("tickets") == {"production": first, "served": later[0], "previous": first}
    registry.set_served("tickets", first, was=second)
    assert registry.aliases("tickets")["served"] == later[0], "somebody else was faster"
    deployed = [entry for entry in registry.history("tickets") if entry["alias"] == "served"]
    assert [(entry["before"], entry["version"]) for entry in deployed] == [(None, first), (first, later[0])]


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
    registry.promote("tickets", version.version, "test")
    assert main(["models"]) == 0
    assert f"tickets@{version.version}  production, served\n" in capsys.readouterr().err


def test_promoting_a_canary_ends_it_and_rolling_back_returns(home: Path) -> None:
    first, second = put(home, "one").version, put(home, "two").version
    registry.set_alias("tickets", "production", first, "run a")
    registry.set_canary("tickets", second, 10, "canary")
    assert registry.canary("tickets")["weight"] == 10
    registry.promote("tickets", second, "promote")
    assert registry.aliases("tickets") == {"production": second, "served": second, "previous": first}
    assert registry.canary("tickets") is None
    assert registry.roll_back("tickets", "worse") == first
    assert registry.aliases("tickets") == {"production": first, "served": first, "previous": second}
    moved = [(entry["alias"], entry["before"], entry["version"]) for entry in registry.history("tickets")]
    assert moved == [
        ("production", None, first),
        ("canary", None, second),
        ("production", first, second),
        ("canary", second, None),
        ("production", second, first),
    ]


def test_what_serves_is_no_canary(home: Path) -> None:
    """It was promoted while it came up to be one."""
    first, second = put(home, "one").version, put(home, "two").version
    registry.set_served("tickets", first, was=None)
    registry.promote("tickets", second, "promote")
    with pytest.raises(ValueError, match="is production already"):
        registry.set_canary("tickets", second, 10, "canary")
    assert registry.canary("tickets") is None


def test_rolling_back_ends_a_canary_first(home: Path) -> None:
    first, second = put(home, "one").version, put(home, "two").version
    registry.set_alias("tickets", "production", first, "run a")
    with pytest.raises(ValueError, match="no canary and no previous version"):
        registry.roll_back("tickets", "worse")
    registry.set_canary("tickets", second, 10, "canary")
    assert registry.roll_back("tickets", "worse") == first
    assert registry.aliases("tickets") == {"production": first}


def test_writers_take_turns(home: Path) -> None:
    """A canary's conductor and a command move aliases at the same time; no move is lost."""
    names = [put(home, f"{number}").version for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: registry.set_alias("tickets", f"alias-{name}", name, "at once"), names))
    assert registry.aliases("tickets") == {f"alias-{name}": name for name in names}
    assert len(registry.history("tickets")) == 8
