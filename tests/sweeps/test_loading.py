"""Bad input: one line that says the rule, the value and where; exit status 2; nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps import loading
from sweeps.__main__ import main

ASHA_LATE = {"grace_period": 5}
RANGE = {"learning_rate": {"low": 1e-2, "high": 1e-4}}

WRONG = {
    "unknown key": ({"traning": {}}, ["traning", "unknown key"]),
    "unknown nested key": ({"search": {"trials": 3}}, ["search.trials", "unknown key"]),
    "wrong type": ({"search": {"num_samples": "many"}}, ["search.num_samples", "integer", "'many'"]),
    "low above high": ({"search": {"space": RANGE, "points_to_evaluate": []}}, ["low=0.01", "high=0.0001"]),
    "late grace": ({"scheduler": ASHA_LATE}, ["scheduler.grace_period", "1 epochs", "got 5"]),
    "unknown preset": ({"training": {"target_modules": "everything"}}, ["training.target_modules", "all-linear"]),
    "preset in space": (
        {"search": {"space": {"target_modules": {"choices": ["mlp", "heads"]}}, "points_to_evaluate": []}},
        ["search.space.target_modules", "'heads'"],
    ),
    "unknown field in space": (
        {"search": {"space": {"lr": {"low": 1, "high": 2}}, "points_to_evaluate": []}},
        ["search.space.lr", "learning_rate"],
    ),
    "two alphas": (
        {"search": {"space": {"lora_alpha": {"choices": [8.0]}, "lora_alpha_ratio": {"choices": [1.0]}},
                    "points_to_evaluate": []}},
        ["lora_alpha_ratio"],
    ),
    "log from zero": (
        {"search": {"space": {"learning_rate": {"low": 0, "high": 1, "log": True}}, "points_to_evaluate": []}},
        ["above 0"],
    ),
    "point out of range": ({"search": {"points_to_evaluate": [{"r": 7}]}}, ["points_to_evaluate.0.r", "7"]),
    "name with a slash": ({"name": "a/b"}, ["name", "'a/b'"]),
    "name with dots": ({"name": ".."}, ["name", "'..'"]),
    "hub id without revision": (
        {"base_model": {"model_name_or_path": "org/model"}}, ["base_model.revision", "org/model"],
    ),
    "base that is no model": (
        {"base_model": {"model_name_or_path": "./tests"}}, ["base_model.model_name_or_path", "config.json"],
    ),
    "file that is not there": (
        {"data": {"sources": [{"path": "nowhere.jsonl"}]}}, ["data.sources.0.path", "nowhere.jsonl"],
    ),
    "general file not there": ({"data": {"general": "nowhere.jsonl"}}, ["data.general", "nowhere.jsonl"]),
    "replicas": (
        {"serving": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 1}}}, ["min_replicas", "max_replicas=1"],
    ),
    "unknown metric": ({"gate": {"metric": "rouge"}}, ["gate.metric", "rougeL", "'rouge'"]),
    "unknown objective": ({"search": {"objectives": ["rouge"]}}, ["search.objectives", "rougeL", "'rouge'"]),
    "objective twice": ({"search": {"objectives": ["f1", "f1"]}}, ["search.objectives", "once", "f1, f1"]),
    "asha on what is known at the end": (
        {"search": {"objectives": ["f1"]}, "scheduler": {"type": "asha"}}, ["scheduler.type", "auto or none", "f1"],
    ),
    "suite of no kind": ({"evaluation": {"suites": {"mine": {"path": "x"}}}}, ["evaluation.suites.mine", "'kind'"]),
    "suite of an unknown kind": (
        {"evaluation": {"suites": {"mine": {"kind": "own", "path": "x"}}}}, ["suites.mine", "'answers', 'safety'"],
    ),
    "suite with a name of ours": (
        {"evaluation": {"suites": {"general": {"kind": "answers", "path": "x"}}}}, ["suites.general", "domain"],
    ),
    "suite that is not there": (
        {"evaluation": {"suites": {"mine": {"kind": "answers", "path": "nowhere.jsonl"}}}},
        ["evaluation.suites.mine.path", "nowhere.jsonl"],
    ),
    "safety judged by nobody": (
        {"evaluation": {"suites": {"mine": {"kind": "safety", "path": "x", "judge": True}}}},
        ["suites.mine.judge", "evaluation.judge"],
    ),
    "pattern that is none": (
        {"evaluation": {"suites": {"mine": {"kind": "safety", "path": "x", "refusals": ["("]}}}},
        ["suites.mine", "refusals", "regular expression", "'('"],
    ),
    "key in a judge's address": (
        {"evaluation": {"judge": {"model": "m", "base_url": "https://a:b@x/v1"}}},
        ["evaluation.judge.base_url", "environment"],
    ),
    "key in a judge's section": (
        {"evaluation": {"judge": {"model": "m", "api_key": "s"}}}, ["evaluation.judge.api_key", "unknown key"],
    ),
    "spend without prices": (
        {"evaluation": {"judge": {"model": "m", "max_spend_usd": 1.0}}}, ["usd_per_million_input_tokens"],
    ),
    "limit on a suite that is not there": ({"gate": {"suites": {"mine": {}}}}, ["gate.suites.mine", "there is none"]),
    "win rate without a judge": ({"gate": {"min_win_rate": 0.5}}, ["gate.min_win_rate", "evaluation.judge"]),
    "tag that no source has": ({"data": {"shares": {"synthetic": {"max": 0.3}}}}, ["shares.synthetic"]),
    "hub data without revision": (
        {"data": {"sources": [{"path": "org/rows"}]}}, ["data.sources.0.revision", "org/rows"],
    ),
    "backend in space": (
        {"search": {"space": {"backend": {"choices": ["solo"]}}, "points_to_evaluate": []}}, ["search.space.backend"],
    ),
    "packed where it cannot be": (
        {"training": {"backend": "packed"}, "resources": {"gpus_per_trial": 2}},
        ["training.backend", "solo or auto", "gpus_per_trial 2 is more than one device"],
    ),
    "not a number": ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_one_line_and_status_2(case, home: Path, definition, write, capsys) -> None:
    sections, words = WRONG[case]
    assert main(["validate", str(write(definition(**sections)))]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["not YAML"]),
        ("- a\n", ["mapping"]),
        ("name: a\nname: b\n", ["'name' twice"]),
    ],
)
def test_a_file_that_is_no_definition(text: str, words: list[str], tmp_path: Path, capsys) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_a_definition_that_is_not_there(capsys) -> None:
    assert main(["validate", "nowhere.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_exponents_without_a_dot_are_numbers(home: Path, definition, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(Path("sweeps/definitions/smoke.yaml").read_text() + "\n")
    loaded = loading.load(path)
    assert loaded.search.space["learning_rate"].low == 1e-4


def test_the_complete_definition_reads_back_as_itself(home: Path, definition, write) -> None:
    loaded = loading.load(write(definition()))
    assert loading.parse(loaded.model_dump(mode="json"), "sweep.json") == loaded


def test_a_definition_cannot_be_changed(home: Path, definition, write) -> None:
    loaded = loading.load(write(definition()))
    with pytest.raises(ValueError, match="frozen"):
        loaded.training.r = 3


@pytest.mark.parametrize(
    ("sections", "obstacle"),
    [
        ({}, None),
        ({"training": {"packing": True}}, "training.packing"),
        ({"base_model": {"dtype": "float16"}}, "base_model.dtype"),
        ({"base_model": {"attn_implementation": "eager"}}, "base_model.attn_implementation"),
        ({"resources": {"gpus_per_trial": 2}}, "resources.gpus_per_trial"),
        (
            {"search": {"space": {"target_modules": {"choices": ["mlp"]}}, "points_to_evaluate": []}},
            "search.space.target_modules",
        ),
    ],
)
def test_auto_packs_where_nothing_is_in_the_way(sections, obstacle, definition) -> None:
    loaded = loading.parse(definition(**sections), "test")
    assert loaded.packs == (obstacle is None)
    assert (loaded.packing_obstacle or "").startswith(obstacle or "")
    alone = loading.parse(definition(**sections | {"training": {"backend": "solo"}}), "test")
    assert not alone.packs


def test_memory_is_planned_for_the_hungriest_of_all_that_is_searched(definition) -> None:
    space = {
        "r": {"low": 4, "high": 64},
        "optim": {"choices": ["adamw_torch", "paged_adamw_8bit"]},
        "train_sampling_strategy": {"choices": ["group_by_length", "random"]},
    }
    training = {"optim": "adamw_8bit"}
    loaded = loading.parse(definition(search={"space": space, "points_to_evaluate": []}, training=training), "test")
    largest = loaded.largest_training
    assert (largest.r, largest.optim, largest.train_sampling_strategy) == (64, "adamw_torch", "group_by_length")
