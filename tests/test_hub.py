"""A base that is named by hub id and revision: the whole way, with a hub on loopback in the place of the real one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from conftest import winnow


@pytest.fixture
def small(definition, all_formats) -> Any:
    def make(revision: str) -> dict[str, Any]:
        return definition(
            base_model={"model_name_or_path": "org/tiny", "revision": revision},
            data={"sources": all_formats},
            search={"num_samples": 1, "objectives": ["field_accuracy", "answer_tokens"], "objective_prompts": 10},
            tracking={"enabled": False},
        )

    return make


def test_a_sweep_over_a_base_from_a_hub(home: Path, small, write, tmp_path: Path) -> None:
    with fake_hub.serve("org/tiny", home / "bases" / "tiny") as (address, handed):
        hub = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        done = winnow("sweeps", "run", write(small(fake_hub.COMMIT)), "--json", env=hub)
        assert done.returncode == 0, done.stderr
        wrong = winnow("sweeps", "run", write(small("no-such-revision")), env=hub)
    assert handed.count("model.safetensors") == 1, "loaded once, then from the cache"
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["trials"][0]["objectives"]) == {"field_accuracy", "answer_tokens"}
    assert 0 < result["trials"][0]["objectives"]["answer_tokens"] <= 8, "max_new_tokens"
    record = json.loads((Path(result["model"]["path"]) / "record.json").read_text())
    assert record["base_model"]["revision"] == fake_hub.COMMIT
    assert record["base_model"]["fingerprint"] == f"org/tiny@{fake_hub.COMMIT}"
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: base_model: 'org/tiny' has no tokenizer")
    assert "Traceback" not in wrong.stderr


def test_data_from_a_hub(home: Path, definition, write, tmp_path: Path) -> None:
    def over(**source: str) -> Path:
        return write(definition(data={"sources": [{"path": "org/rows", **source}]}))

    (tmp_path / "rows").mkdir()
    shutil.copy(home / "sources" / "tickets" / "tickets.jsonl", tmp_path / "rows" / "rows.jsonl")
    with fake_hub.serve("org/rows", tmp_path / "rows", "datasets") as (address, handed):
        hub = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        first = winnow("sweeps", "data", over(revision=fake_hub.COMMIT), "--json", env=hub)
        assert first.returncode == 0, first.stderr
        wrong = winnow("sweeps", "data", over(revision=fake_hub.COMMIT, split="nowhere"), env=hub)
        floating = winnow("sweeps", "data", over(), env=hub)
    assert "rows.jsonl" in handed
    manifest = json.loads(first.stdout)
    assert manifest["sources"][0]["name"] == "rows"
    assert manifest["steps"][0] == {"step": "read", "in": 132, "out": 132, "source": "rows"}
    assert (wrong.returncode, floating.returncode) == (2, 2)
    assert wrong.stderr.startswith("error: data.sources.0.path: hub dataset 'org/rows' cannot be loaded: "), (
        wrong.stderr
    )
    assert len(wrong.stderr.splitlines()) == 1
    assert "data.sources.0.revision: required for the hub id 'org/rows'" in floating.stderr
