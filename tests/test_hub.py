"""Data that is named by hub id and revision, with a hub on loopback in the place of the real one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fake_hub
from conftest import winnow


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
