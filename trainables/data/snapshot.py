"""One immutable, content-addressed snapshot of the data: read, deduplicated, split, tokenised, written once.

The hash covers the sources' bytes, the settings and the tokenizer, so the same input gives the same directory. Both
backends and the gate read tokens from here: there is one truth about what was trained on and scored.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import files, paths
from trainables.data import chat
from trainables.data.duplicates import Duplicate, find_duplicates
from trainables.data.formats import Example, read_examples
from trainables.spec import DataSpec

FORMAT = 1  # in the hash: a change of what a snapshot holds is a new snapshot
SPLITS = ("train", "eval", "test", "general")


@dataclass(frozen=True)
class Snapshot:
    """A prepared data set on disk."""

    directory: Path
    dataset_hash: str
    manifest: dict[str, Any]

    def rows(self, split: str) -> list[dict[str, Any]]:
        """All rows of a split: ``messages``, ``input_ids`` [T], ``labels`` [T], -100 where nothing is learned."""
        table = pq.read_table(self.directory / f"{split}.parquet")
        rows = table.to_pylist()
        for row in rows:
            row["messages"] = json.loads(row["messages"])
        return rows

    def count(self, split: str) -> int:
        return self.manifest["splits"][split]["examples"]


def load(directory: Path) -> Snapshot:
    manifest = files.read_json(directory / "manifest.json")
    return Snapshot(directory, manifest["dataset_hash"], manifest)


def prepare(
    spec: DataSpec, tokenizer: Any, completion_only: bool = True, log: Callable[[str], None] = lambda _: None
) -> Snapshot:
    """The snapshot of these sources, made now or found from before.

    Args:
        completion_only: label the assistant's tokens alone.
        log: takes a line of progress.

    Raises:
        ValueError: a row is wrong, the data is too small to split, or an example has nothing to train on.
    """
    chat.check_template(tokenizer, completion_only)
    dataset_hash = _hash(spec, tokenizer, completion_only)
    directory = paths.datasets() / dataset_hash
    if (directory / "manifest.json").exists():
        log(f"data: snapshot {dataset_hash} is there already")
        return load(directory)
    sources = [(source, read_examples(paths.expand(source.path))) for source in spec.sources]
    general = read_examples(paths.expand(spec.general)) if spec.general else []
    examples = [(example, source.splits) for source, rows in sources for example in rows]
    log(f"data: {len(examples):,} examples read, looking for duplicates")
    kept, duplicates = _drop_duplicates([example for example, _ in examples], general, spec.near_duplicate_threshold)
    splits = _split(spec, [examples[index] for index in kept]) | {"general": general}
    encoded = {name: _encode(name, rows, tokenizer, spec.max_length, completion_only) for name, rows in splits.items()}
    manifest = {
        "dataset_hash": dataset_hash,
        "sources": [_describe(Path(paths.expand(source.path)), len(rows)) for source, rows in sources],
        "settings": spec.model_dump(mode="json") | {"completion_only_loss": completion_only},
        "duplicates": duplicates,
        "splits": {name: summary for name, (_, summary) in encoded.items()},
    }
    with suppress(FileExistsError), files.new_directory(directory) as unfinished:  # another process made the same
        for name, (table, _) in encoded.items():
            pq.write_table(table, unfinished / f"{name}.parquet")
        files.write_json(unfinished / "manifest.json", manifest)
    return load(directory)


def _hash(spec: DataSpec, tokenizer: Any, completion_only: bool) -> str:
    """16 hex digits over everything that decides what the snapshot holds; paths and names do not."""
    settings = spec.model_dump(mode="json", exclude={"sources", "general"})
    digest = hashlib.sha256(json.dumps([FORMAT, settings, completion_only], sort_keys=True).encode())
    for source in spec.sources:
        digest.update(f"{source.splits}:{_file_hash(paths.expand(source.path))}".encode())
    digest.update(f"general:{_file_hash(paths.expand(spec.general)) if spec.general else None}".encode())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps([vocabulary, tokenizer.chat_template]).encode())
    return digest.hexdigest()[:16]


def _file_hash(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"data: no such file: {path}")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(path: Path, rows: int) -> dict[str, Any]:
    return {"name": path.name, "sha256": _file_hash(path), "rows": rows}


def _drop_duplicates(
    examples: Sequence[Example], general: Sequence[Example], threshold: float
) -> tuple[list[int], dict[str, Any]]:
    """Indices of ``examples`` to keep, and the account of what went. The general set stands first: it always stays."""
    everything = [*general, *examples]
    found = [
        duplicate
        for duplicate in find_duplicates([example.text for example in everything], threshold)
        if duplicate.index >= len(general)
    ]
    gone = {duplicate.index for duplicate in found}
    kept = [index for index in range(len(examples)) if index + len(general) not in gone]
    exact = sum(everything[found_one.index].text == everything[found_one.of].text for found_one in found)
    return kept, {
        "exact": exact,
        "near": len(found) - exact,
        "pairs": [_pair(everything, duplicate) for duplicate in found[:50]],
    }


def _pair(everything: Sequence[Example], duplicate: Duplicate) -> dict[str, Any]:
    removed, kept = everything[duplicate.index], everything[duplicate.of]
    return {
        "removed": f"{removed.source}:{removed.line}",
        "kept": f"{kept.source}:{kept.line}",
        "similarity": duplicate.similarity,
    }


def _split(spec: DataSpec, examples: Sequence[tuple[Example, str]]) -> dict[str, list[Example]]:
    """Train, eval and test by seed; examples marked ``train`` or ``train_eval`` go nowhere else."""
    everywhere, no_test, train_only = (
        [example for example, splits in examples if splits == wanted] for wanted in ("all", "train_eval", "train")
    )
    for pool in (everywhere, no_test):
        random.Random(spec.seed).shuffle(pool)
    evals, tests = round(len(everywhere) * spec.eval_size), round(len(everywhere) * spec.test_size)
    if min(evals, tests) < 1 or len(everywhere) - evals - tests < 1:
        raise ValueError(
            f"data: too small to split: {len(everywhere)} distinct examples give {evals} for eval "
            f"(eval_size {spec.eval_size:g}) and {tests} for test (test_size {spec.test_size:g}), and each split "
            f"needs at least 1; add examples or raise the shares"
        )
    seen = round(len(no_test) * spec.eval_size)
    train = everywhere[evals + tests :] + no_test[seen:] + train_only
    random.Random(spec.seed + 1).shuffle(train)
    evaluated = everywhere[:evals] + no_test[:seen]
    return {"train": train, "eval": evaluated, "test": everywhere[evals : evals + tests]}


def _encode(
    name: str, examples: Sequence[Example], tokenizer: Any, max_length: int, completion_only: bool
) -> tuple[pa.Table, dict[str, Any]]:
    """A split as a table, and its counts."""
    encoded = chat.encode(tokenizer, [example.messages for example in examples], max_length) if examples else []
    labels = [row.labels(completion_only) for row in encoded]
    _check_trained(name, examples, labels, max_length)
    table = pa.table(
        {
            "messages": pa.array([json.dumps(example.messages) for example in examples], pa.string()),
            "source": pa.array([f"{example.source}:{example.line}" for example in examples], pa.string()),
            "input_ids": pa.array([row.input_ids for row in encoded], pa.list_(pa.int32())),
            "labels": pa.array(labels, pa.list_(pa.int32())),
        }
    )
    lengths = sorted(row.full_length for row in encoded)
    summary = {
        "examples": len(examples),
        "tokens": sum(len(row.input_ids) for row in encoded),
        "trained_tokens": sum(label != -100 for row in labels for label in row),
        "over_long": sum(row.was_cut for row in encoded),
        "longest": lengths[-1] if lengths else 0,
        "median": lengths[len(lengths) // 2] if lengths else 0,
    }
    return table, summary


def _check_trained(name: str, examples: Sequence[Example], labels: Sequence[Sequence[int]], max_length: int) -> None:
    """Every example has a token to learn: transformers shifts labels by one, so the first never counts."""
    for example, row in zip(examples, labels, strict=True):
        if all(label == -100 for label in row[1:]):
            raise ValueError(
                f"{example.source}:{example.line}: no trained token left ({name} split): its answer must begin within "
                f"data.max_length={max_length} tokens and be the assistant's; raise max_length or mend the row"
            )


def summary_line(snapshot: Snapshot) -> str:
    """One line for people: sizes, what was dropped, what was cut."""
    splits, duplicates = snapshot.manifest["splits"], snapshot.manifest["duplicates"]
    sizes = ", ".join(f"{splits[name]['examples']:,} {name}" for name in SPLITS if splits[name]["examples"])
    over_long = sum(split["over_long"] for split in splits.values())
    return (
        f"data: snapshot {snapshot.dataset_hash}: {sizes}; dropped {duplicates['exact']} exact and "
        f"{duplicates['near']} near duplicates; {over_long} over-long examples cut"
    )
