"""Where rows come from: a JSONL or Parquet file, a directory of them, or a hub dataset; each with a content hash."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import paths
from trainables.data.formats import Row, RowError
from trainables.spec import SourceSpec

Numbered = Iterator[tuple[int, Row | RowError]]


@dataclass(frozen=True)
class File:
    """One file of rows; ``name`` is how rows of it are told of."""

    name: str
    path: Path

    def sha256(self) -> str:
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def rows(self) -> Numbered:
        """Every row that is not blank, by its number from 1, read as it is asked for.

        Raises:
            ValueError: the file is not what its name says.
        """
        return _parquet(self.path) if self.path.suffix == ".parquet" else _jsonl(self.path)


@dataclass(frozen=True)
class HubDataset:
    """One split of a hub dataset, at one revision."""

    name: str
    rows_of_it: Any

    def sha256(self) -> str:
        """Over the rows themselves: how a hub stores them does not matter."""
        digest = hashlib.sha256()
        for row in self.rows_of_it:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def rows(self) -> Numbered:
        yield from enumerate(map(_filled, self.rows_of_it), 1)


Part = File | HubDataset


def parts(spec: SourceSpec, place: str) -> list[Part]:
    """The files of a source in order of their names, or its hub dataset, loaded.

    Args:
        place: what to call the source in an error, such as ``data.sources.0.path``.

    Raises:
        ValueError: there is no such file, directory or dataset, or it holds nothing that can be read.
    """
    path = paths.expand(spec.path)
    if path.is_file():
        return [File(path.name, path)]
    if path.is_dir():
        return [File(f"{path.name}/{file.relative_to(path)}", file) for file in _files(path, spec, place)]
    if paths.is_hub_id(spec.path):
        return [HubDataset(spec.path.rpartition("/")[2], _load_from_hub(spec, place))]
    raise ValueError(f"{place}: no such file: {spec.path!r}; name a JSONL or Parquet file, a directory, or a hub id")


def _files(directory: Path, spec: SourceSpec, place: str) -> list[Path]:
    found = [file for suffix in paths.DATA_SUFFIXES for file in directory.rglob(f"[!.]*{suffix}")]
    if not found:
        raise ValueError(f"{place}: no {' or '.join(paths.DATA_SUFFIXES)} file in the directory {spec.path!r}")
    return sorted(found)


def _load_from_hub(spec: SourceSpec, place: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(spec.path, spec.name, split=spec.split, revision=spec.revision)
    except Exception as error:  # datasets lets its parsers' own errors through, of many kinds
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{place}: hub dataset {spec.path!r} cannot be loaded: {line}") from None


def _jsonl(path: Path) -> Numbered:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, _row(line)


def _row(line: bytes) -> Row | RowError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("broken_row", f"must be UTF-8 text, but byte {error.start} of the line is not")
    except json.JSONDecodeError as error:
        return RowError("broken_row", f"must be one JSON object a line, but it is not JSON at column {error.colno}")
    if not isinstance(row, dict):
        return RowError("broken_row", f"must be a JSON object, but got a {type(row).__name__}")
    return row


def _parquet(path: Path) -> Numbered:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: must be a Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, _filled(row)


def _filled(row: Row) -> Row:
    """A row without the columns that are empty in it: a table has every column in every row."""
    return {name: value for name, value in row.items() if value is not None}
