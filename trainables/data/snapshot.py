"""One immutable, content-addressed snapshot of the data on disk. ``prepare`` makes it; everybody else reads it.

Both backends and the gate read tokens from here: there is one truth about what was trained on and scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import files, paths

SPLITS = ("train", "eval", "test", "general")


@dataclass(frozen=True)
class Snapshot:
    """A prepared data set on disk."""

    directory: Path
    dataset_hash: str
    manifest: dict[str, Any]

    def rows(self, split: str) -> list[dict[str, Any]]:
        """All rows of a split: ``messages``, ``input_ids`` [T], ``labels`` [T], -100 where nothing is learned.

        A row of plain text has no messages.
        """
        table = pq.read_table(self.directory / f"{split}.parquet")
        rows = table.to_pylist()
        for row in rows:
            row["messages"] = json.loads(row["messages"])
        return rows

    def highest_token(self) -> int:
        """Of all splits; -1 where they are empty."""
        columns = (
            pq.read_table(self.directory / f"{split}.parquet", columns=["input_ids"]).column(0) for split in SPLITS
        )
        found = (pc.max(pc.list_flatten(column)).as_py() for column in columns)
        return max((token for token in found if token is not None), default=-1)

    def count(self, split: str) -> int:
        return self.manifest["splits"][split]["rows"]

    def answers(self, split: str) -> int:
        """Rows of a split that have an answer to compare with."""
        return self.manifest["splits"][split]["answers"]


def answered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which somebody asks and the assistant has the last word: in others there is no answer to compare with."""
    return [row for row in rows if len(row["messages"]) > 1 and row["messages"][-1]["role"] == "assistant"]


def load(directory: Path) -> Snapshot:
    manifest = files.read_json(directory / "manifest.json")
    return Snapshot(directory, manifest["dataset_hash"], manifest)


def find(dataset_hash: str) -> Snapshot | None:
    """The snapshot of this hash, where it has been made."""
    directory = paths.datasets() / dataset_hash
    return load(directory) if (directory / "manifest.json").exists() else None


def write(manifest: dict[str, Any], tables: Mapping[str, pa.Table], pairs: list[dict[str, Any]]) -> Snapshot:
    """Whole or not at all; where another process wrote the same meanwhile, that one stays."""
    directory = paths.datasets() / manifest["dataset_hash"]
    with suppress(FileExistsError), files.new_directory(directory) as unfinished:
        for name, table in tables.items():
            pq.write_table(table, unfinished / f"{name}.parquet")
        lines = [json.dumps(pair) for pair in pairs]
        (unfinished / "duplicates.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        files.write_json(unfinished / "manifest.json", manifest)
    return load(directory)


def summary_line(snapshot: Snapshot) -> str:
    """One line for people: sizes, what was dropped, what was cut."""
    splits, duplicates = snapshot.manifest["splits"], snapshot.manifest["duplicates"]
    sizes = ", ".join(f"{splits[name]['rows']:,} {name}" for name in SPLITS if splits[name]["rows"])
    over_long = sum(split["over_long"] for split in splits.values())
    return (
        f"data: snapshot {snapshot.dataset_hash}: {sizes}; dropped {duplicates['exact']} exact and "
        f"{duplicates['near']} near duplicates; {over_long} over-long examples cut"
    )
