"""``python -m sweeps data``: a poisoned dataset of which every plant is found, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from browser import look_at, needs_browser
from conftest import winnow
from poisoned import PERSONAL, PLANTED, plant

from sweeps import dataset, loading
from sweeps.__main__ import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def data(write, capsys) -> Callable[[dict[str, Any]], Done]:
    """``python -m sweeps data DEF --json`` in this process."""

    def command(content: dict[str, Any]) -> Done:
        code = main(["data", str(write(content)), "--json"])
        return Done(code, *capsys.readouterr())

    return command


@pytest.fixture
def poisoned(home: Path, definition, tmp_path: Path):
    """The smoke definition over the poisoned data, with changes to its data section."""
    sources = home / "sources" / "tickets"
    plant(sources / "tickets.jsonl", sources / "general-test.jsonl", tmp_path / "poisoned")

    def make(**data: Any) -> dict[str, Any]:
        parts = [
            {"path": str(tmp_path / "poisoned" / "tickets.jsonl")},
            {"path": str(tmp_path / "poisoned" / "synthetic.jsonl"), "tag": "synthetic"},
        ]
        return definition(data={"sources": parts, "shares": {"synthetic": {"max": 0.1}}} | data)

    return make


def test_every_plant_is_found(home: Path, poisoned, data) -> None:
    done = data(poisoned())
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: data: refused")
    assert "Traceback" not in done.err
    manifest = done.manifest
    found = {(one["check"], one["level"]): one for one in manifest["findings"]}
    for check, (level, count) in PLANTED.items():
        assert (check, level) in found, check
        assert count is None or found[check, level]["count"] == count, found[check, level]
    assert set(manifest["personal_data"]["values"]) == set(PERSONAL)
    assert manifest["snapshot"] is None
    assert [path.name for path in (home / "datasets").iterdir()] == [Path(manifest["page"]).name]
    page = Path(manifest["page"]).read_text()
    assert all(one["message"].split(" (")[0][:40] in page for one in manifest["findings"])


def test_a_run_of_it_is_refused_in_one_line(home: Path, poisoned, write) -> None:
    done = winnow("sweeps", "run", write(poisoned()))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: data: 2 rows are no JSON objects (tickets.jsonl "), last
    assert "set data.wrong_rows to drop" in last
    assert "data.shares.synthetic allows at most 10%" in last
    assert not (home / "runs").exists()


def test_redacted_and_mixed_it_trains_and_nothing_found_is_left_anywhere(home: Path, poisoned, data) -> None:
    mended = poisoned(wrong_rows="drop", personal_data={"action": "redact"}, max_length=400)
    mended["data"]["sources"][1]["max_examples"] = 10
    done = data(mended)
    assert done.code == 0, done.err
    manifest = done.manifest
    snapshot = Path(manifest["snapshot"])
    texts = [text for split in snapshot.glob("*.parquet") for text in pq.read_table(split)["messages"].to_pylist()]
    written = [*texts, done.out, done.err, Path(manifest["page"]).read_text()]
    written += [path.read_text() for path in (*snapshot.glob("*.json"), *snapshot.glob("*.jsonl"))]
    for value in PERSONAL.values():
        assert not any(value in text or value.upper() in text for text in written), value
    assert any("write to <EMAIL_ADDRESS_1> or <EMAIL_ADDRESS_1>, never to <EMAIL_ADDRESS_2>" in text for text in texts)
    assert manifest["shares"]["synthetic"]["share"] <= 0.1
    mixed = next(step for step in manifest["steps"] if step["step"] == "mix")
    assert [source["out"] for source in mixed["sources"]][1] == 10


def test_rejected_examples_are_counted_and_gone(home: Path, poisoned, data) -> None:
    kept = poisoned(wrong_rows="drop", shares={}, personal_data={"action": "reject"})
    manifest = data(kept).manifest
    step = next(step for step in manifest["steps"] if step["step"] == "personal_data")
    assert step["in"] - step["out"] == manifest["personal_data"]["examples"] == 8
    narrow = kept | {"data": kept["data"] | {"personal_data": {"action": "reject", "entities": ["API_KEY"]}}}
    manifest = data(narrow).manifest
    assert manifest["personal_data"]["values"] == {"API_KEY": 1}


@needs_browser
def test_the_page_in_a_browser(home: Path, poisoned, data, tmp_path: Path) -> None:
    manifest = data(poisoned(wrong_rows="drop", shares={}, max_length=400)).manifest
    seen = look_at(Path(manifest["page"]), tmp_path / "browser")
    assert seen.complaints == []
    assert seen.charts == 1
    assert seen.document.count('<pre class="example">') == 10
    assert seen.document.count("<mark>") >= 10


def test_the_gates_metric_has_to_fit_the_answers(home: Path, definition, all_formats) -> None:
    for metric in ("f1", "field_accuracy.colour"):
        told = rf"must be one of .*field_accuracy\.urgency.* answers are extraction, but got '{metric}'"
        with pytest.raises(ValueError, match=told):
            dataset.prepared(loading.parse(definition(gate={"metric": metric}), "sweep.yaml"))
    dataset.prepared(loading.parse(definition(gate={"metric": "field_accuracy.urgency"}), "sweep.yaml"))
    plain = Path(all_formats[1]["path"])
    plain.write_text("\n".join(json.dumps({"text": f"a text of its own, number {n * 7919}"}) for n in range(80)))
    only_plain = loading.parse(definition(data={"sources": [{"path": str(plain)}]}), "sweep.yaml")
    with pytest.raises(ValueError, match="exact_match compares answers, but no example of the test split has one"):
        dataset.prepared(only_plain)


def test_good_data_raises_no_alarm(home: Path, definition, data) -> None:
    manifest = data(definition()).manifest
    assert [one["check"] for one in manifest["findings"] if one["level"] != "info"] == ["few"]


def test_two_people_get_the_same_hash_and_every_setting_of_a_source_counts(home: Path, definition, data) -> None:
    tickets = home / "sources" / "tickets" / "tickets.jsonl"
    elsewhere = home / "copied.jsonl"
    elsewhere.write_bytes(tickets.read_bytes())

    def hash_of(**source: Any) -> str:
        return data(definition(data={"sources": [source]})).manifest["dataset_hash"]

    same = {hash_of(path=str(tickets)), hash_of(path=str(elsewhere))}
    assert len(same) == 1
    changes = [{"tag": "other"}, {"weight": 2.0}, {"max_examples": 100}]
    assert len(same | {hash_of(path=str(tickets), **change) for change in changes}) == 4
