"""The way of the data, once, in order: read, looked through, deduplicated, mixed, split, tokenised, written.

Every step leaves its counts in the manifest, and every doubt a finding. The hash covers the sources' bytes, the
settings and the tokenizer, so the same input gives two people the same directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from trainables.data import chat, mixture, quality, snapshot, sources
from trainables.data.duplicates import find_duplicates
from trainables.data.formats import Example, WrongRow, prefixed, read_rows
from trainables.data.quality import Finding
from trainables.data.snapshot import SPLITS, Snapshot
from trainables.data.sources import Part
from trainables.data.suites import Suite
from trainables.spec import DataSpec, PersonalDataSpec, SourceSpec

Log = Callable[[str], None]

FORMAT = 2  # in the hash: a change of what a snapshot holds is a new snapshot
_PACKAGES = ("presidio-analyzer", "detect-secrets", "py3langid", "datasketch", "transformers")
_ENCODED_AT_ONCE = 1000
_BINS = 40
_PAIRS_SHOWN = 50
_SAMPLES = 10


@dataclass
class Account:
    """What is known of the data so far: the manifest, filled step by step."""

    manifest: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """All duplicates, of which the manifest has the first."""

    def step(self, name: str, before: int, after: int, **counts: Any) -> None:
        self.manifest["steps"].append({"step": name, "in": before, "out": after, **counts})

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


def prepare(
    spec: DataSpec,
    tokenizer: Any,
    completion_only: bool = True,
    log: Log = lambda _: None,
    suites: Sequence[Suite] = (),
) -> Snapshot:
    """The snapshot of these sources, made now or found from before.

    Args:
        completion_only: label the assistant's tokens alone.
        log: takes lines of progress, and every warning.
        suites: what they ask must not be trained on.

    Raises:
        ValueError: a source cannot be read, or something about the data is an error; the line names each.
    """
    return accepted(*examine(spec, tokenizer, completion_only, log, suites), log)


def accepted(manifest: dict[str, Any], made: Snapshot | None, log: Log) -> Snapshot:
    """What ``examine`` made, if it made it; logs the warnings.

    Raises:
        ValueError: something about the data is an error; the line names each.
    """
    for finding in manifest["findings"]:
        if finding["level"] == "warning":
            log(f"data: warning: {told(finding)}")
    if made is None:
        raise ValueError("; ".join(f"data: {told(one)}" for one in manifest["findings"] if one["level"] == "error"))
    return made


def told(finding: dict[str, Any]) -> str:
    """A finding of a manifest on one line, with the first place to look at."""
    where = f", as in {finding['examples'][0]}" if finding["examples"] else ""
    return f"{finding['count']:,} {finding['message']}{where}"


def examine(
    spec: DataSpec,
    tokenizer: Any,
    completion_only: bool = True,
    log: Log = lambda _: None,
    suites: Sequence[Suite] = (),
) -> tuple[dict[str, Any], Snapshot | None]:
    """The manifest, and the snapshot, which is not written where a finding is an error.

    Raises:
        ValueError: a source cannot be read at all, or the tokenizer has no template for what is in it.
    """
    opened = [sources.parts(source, f"data.sources.{index}.path") for index, source in enumerate(spec.sources)]
    general = sources.parts(SourceSpec(path=spec.general), "data.general") if spec.general else []
    described = [[{"name": part.name, "sha256": part.sha256()} for part in parts] for parts in (*opened, general)]
    suites = [suite for suite in suites if suite.examples]
    apart = [suite.sources for suite in suites]
    dataset_hash = _hash(spec, described + apart, tokenizer, completion_only)
    if found := snapshot.find(dataset_hash):
        log(f"data: snapshot {dataset_hash} is there already")
        return found.manifest, found
    account = Account(_opening(spec, described, apart, dataset_hash, completion_only))
    groups = [_read(parts, spec, account, log) for parts in (*opened, general)]
    *groups, held_out = _look_through(groups, spec.personal_data, account, log)
    account.findings += quality.check([example for group in groups for example in group])
    asked = [example for suite in suites for example in suite.examples]
    groups = _deduplicate(groups, [*held_out, *asked], spec.near_duplicate_threshold, account, log)
    groups = _mix(groups, spec, account)
    splits = _split(groups, spec, account)
    if not splits:
        return _closed(account), None
    tables = _encode(splits | {"general": held_out}, spec, tokenizer, completion_only, account, log)
    manifest = _closed(account)
    return manifest, None if account.errors else snapshot.write(manifest, tables, account.pairs)


def _hash(spec: DataSpec, described: list[list[dict[str, str]]], tokenizer: Any, completion_only: bool) -> str:
    """16 hex digits over everything that decides what the snapshot holds; paths and names do not."""
    settings = spec.model_dump(mode="json")
    settings["general"] = None
    settings["sources"] = [
        {name: source[name] for name in ("splits", "tag", "weight", "max_examples")} for source in settings["sources"]
    ]
    content = [[part["sha256"] for part in parts] for parts in described]
    words = [FORMAT, settings, completion_only, content, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def _opening(
    spec: DataSpec,
    described: list[list[dict[str, str]]],
    apart: list[list[dict[str, str]]],
    dataset_hash: str,
    completion_only: bool,
) -> dict[str, Any]:
    tags = [*(source.tag for source in spec.sources), "held out", *("suite" for _ in apart)]
    return {
        "dataset_hash": dataset_hash,
        "sources": [part | {"tag": tag} for parts, tag in zip(described + apart, tags, strict=True) for part in parts],
        "settings": spec.model_dump(mode="json") | {"completion_only_loss": completion_only},
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "steps": [],
    }


def _read(parts: Sequence[Part], spec: DataSpec, account: Account, log: Log) -> list[Example]:
    """All good rows of one source; wrong ones are findings."""
    examples: list[Example] = []
    wrong: list[WrongRow] = []
    for part in parts:
        before = len(examples), len(wrong)
        for row in read_rows(part.rows(), part.name):
            (examples if isinstance(row, Example) else wrong).append(row)  # type: ignore[arg-type]
        good, bad = len(examples) - before[0], len(wrong) - before[1]
        account.step("read", good + bad, good, source=part.name)
        log(f"data: {part.name}: {good:,} examples read" + (f", {bad:,} wrong rows" if bad else ""))
    account.findings += quality.wrong_rows(wrong, spec.wrong_rows == "drop")
    return prefixed(examples, spec.task_prefixes)


def _look_through(
    groups: list[list[Example]], spec: PersonalDataSpec, account: Account, log: Log
) -> list[list[Example]]:
    """What personal data there is, and the examples as the definition wants them left."""
    account.manifest["personal_data"] = {"action": spec.action, "examples": 0, "values": {}}
    if spec.action == "off":
        return groups
    log("data: looking for personal data and secrets")
    from trainables.data import personal  # brings Presidio, which takes two seconds to import

    looked = [personal.look_through(group, spec) for group in groups]
    values = sum((found.values for _, found in looked), Counter[str]())
    places = [place for _, found in looked for place in found.places]
    left = [group for group, _ in looked]
    account.manifest["personal_data"] |= {"examples": len(places), "values": dict(values.most_common())}
    account.step("personal_data", sum(map(len, groups)), sum(map(len, left)), action=spec.action, values=dict(values))
    if places:
        account.findings.append(quality.personal_data(places, values, spec.action))
    return left


def _deduplicate(
    groups: list[list[Example]], held_out: list[Example], threshold: float, account: Account, log: Log
) -> list[list[Example]]:
    """Every example once. What is held out stands first: it always stays."""
    everything = [*held_out, *(example for group in groups for example in group)]
    log(f"data: looking for duplicates among {len(everything):,} examples")
    found = find_duplicates([example.text for example in everything], threshold)
    repeats = [one for one in found if one.index >= len(held_out)]
    account.pairs = [
        {
            "removed": everything[one.index].place,
            "kept": everything[one.of].place,
            "similarity": one.similarity,
            "removed_text": everything[one.index].text,
            "kept_text": everything[one.of].text,
        }
        for one in repeats
    ]
    exact = sum(pair["removed_text"] == pair["kept_text"] for pair in account.pairs)
    account.manifest["duplicates"] = {
        "exact": exact,
        "near": len(repeats) - exact,
        "of_held_out": sum(one.of < len(held_out) for one in repeats),
        "pairs": account.pairs[:_PAIRS_SHOWN],
    }
    account.findings += quality.duplicates(account.manifest["duplicates"])
    gone = {one.index for one in repeats}
    numbered = iter(range(len(held_out), len(everything)))
    left = [[example for example in group if next(numbered) not in gone] for group in groups]
    account.step("deduplicate", sum(map(len, groups)), sum(map(len, left)), exact=exact, near=len(repeats) - exact)
    return left


def _mix(groups: list[list[Example]], spec: DataSpec, account: Account) -> list[list[Example]]:
    mixed = mixture.mix(spec.sources, groups, spec.seed)
    taken = [
        {"source": source.path, "tag": source.tag, "in": len(group), "out": len(left)}
        for source, group, left in zip(spec.sources, groups, mixed, strict=True)
    ]
    account.step("mix", sum(map(len, groups)), sum(map(len, mixed)), sources=taken)
    return mixed


def _split(groups: list[list[Example]], spec: DataSpec, account: Account) -> dict[str, list[Example]]:
    """Train, eval and test by seed, each source where it may go; nothing where there is too little to split."""
    everywhere, no_test, train_only = (
        [
            example
            for source, group in zip(spec.sources, groups, strict=True)
            if source.splits == wanted
            for example in group
        ]
        for wanted in ("all", "train_eval", "train")
    )
    for pool in (everywhere, no_test):
        random.Random(spec.seed).shuffle(pool)
    evals, tests = round(len(everywhere) * spec.eval_size), round(len(everywhere) * spec.test_size)
    if min(evals, tests) < 1 or len(everywhere) - evals - tests < 1:
        account.findings.append(quality.too_small_to_split(len(everywhere), evals, tests, spec))
        return {}
    seen = round(len(no_test) * spec.eval_size)
    train = everywhere[evals + tests :] + no_test[seen:] + train_only
    random.Random(spec.seed + 1).shuffle(train)
    splits = {"train": train, "eval": everywhere[:evals] + no_test[:seen], "test": everywhere[evals : evals + tests]}
    total = sum(map(len, groups))
    account.findings += quality.size(total, spec.min_examples)
    account.step("split", total, total, **{name: len(split) for name, split in splits.items()})
    _share(train, groups, spec, account)
    return splits


def _share(train: list[Example], groups: list[list[Example]], spec: DataSpec, account: Account) -> None:
    """What part of the training split each tag has."""
    # by identity: equal rows may stand in two sources
    tags = {id(example): source.tag for source, group in zip(spec.sources, groups, strict=True) for example in group}
    counts = Counter({source.tag: 0 for source in spec.sources})
    counts.update(tags[id(example)] for example in train)
    account.manifest["shares"] = {
        tag: {"examples": count, "share": round(count / len(train), 6)}
        | (spec.shares[tag].model_dump() if tag in spec.shares else {})
        for tag, count in counts.items()
    }
    account.findings += mixture.check_shares(counts, spec.shares)


def _encode(
    splits: dict[str, list[Example]], spec: DataSpec, tokenizer: Any, completion_only: bool, account: Account, log: Log
) -> dict[str, pa.Table]:
    """Every split as a table of tokens."""
    log("data: tokenising")
    if any(example.messages for split in splits.values() for example in split):
        chat.check_template(tokenizer, completion_only)
    encoded = {name: _table(split, tokenizer, spec.max_length, completion_only) for name, split in splits.items()}
    summaries = account.manifest["splits"] = {name: encoded[name].summary() for name in SPLITS}
    total = {
        field: sum(one[field] for one in summaries.values()) for field in ("examples", "rows", "tokens", "over_long")
    }
    account.step("tokenise", total.pop("examples"), total.pop("rows"), **total)
    lengths = [length for name in SPLITS for length in encoded[name].lengths]
    counts, edges = np.histogram(lengths, bins=min(_BINS, max(lengths)))
    account.manifest["lengths"] = {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]}
    account.findings += quality.lengths(
        [place for name in SPLITS for place in encoded[name].cut],
        [place for name in SPLITS for place in encoded[name].untrained],
        spec.max_length,
    )
    account.manifest["samples"] = _samples(encoded["train"].table, tokenizer, spec.seed)
    return {name: one.table for name, one in encoded.items()}


@dataclass
class _Encoded:
    """A split in tokens."""

    table: pa.Table
    examples: int
    answers: int
    lengths: list[int]
    """Tokens of every row before it was cut."""
    cut: list[str]
    untrained: list[str]

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.lengths)
        labels = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in self.table["labels"].chunks]
        return {
            "examples": self.examples,
            "rows": self.table.num_rows,
            "answers": self.answers,
            "tokens": sum(map(len, labels)),
            "trained_tokens": sum(int((chunk != -100).sum()) for chunk in labels),
            "over_long": len(self.cut),
            "longest": ordered[-1] if ordered else 0,
            "median": ordered[len(ordered) // 2] if ordered else 0,
        }


_SCHEMA = pa.schema(
    {
        "messages": pa.string(),
        "source": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)


def _table(examples: Sequence[Example], tokenizer: Any, max_length: int, completion_only: bool) -> _Encoded:
    """A split in tokens, made a thousand examples at a time: as Python's lists, tokens take ten times the room."""
    answers = sum(example.answer is not None for example in examples)
    split = _Encoded(_SCHEMA.empty_table(), len(examples), answers, [], [], [])
    batches = []
    for start in range(0, len(examples), _ENCODED_AT_ONCE):
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        for example, row in _rows(examples[start : start + _ENCODED_AT_ONCE], tokenizer, max_length):
            labels = row.labels(completion_only)
            values = (json.dumps(example.messages), example.place, row.input_ids, labels)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            split.lengths.append(row.full_length)
            split.cut += [example.place] if row.was_cut else []
            split.untrained += [example.place] if all(label == -100 for label in labels[1:]) else []
        batches.append(pa.table(columns, schema=_SCHEMA))
    split.table = pa.concat_tables(batches) if batches else split.table
    return split


def _rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Iterable[tuple[Example, chat.Encoded]]:
    """Examples and their rows, in order: a conversation has one, a plain text as many as it takes."""
    conversations = chat.encode(tokenizer, [one.messages for one in examples if one.messages], max_length)
    told = iter(conversations)
    for example in examples:
        if example.plain is None:
            yield example, next(told)
        else:
            yield from ((example, row) for row in chat.encode_plain(tokenizer, example.plain, max_length))


def _samples(table: pa.Table, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """A few rows of the training split, as text with the trained runs marked."""
    chosen = sorted(random.Random(seed).sample(range(table.num_rows), min(_SAMPLES, table.num_rows)))
    rows = table.take(chosen).to_pylist()
    return [
        {"source": row["source"], "runs": chat.marked_text(tokenizer, row["input_ids"], row["labels"])} for row in rows
    ]


def _closed(account: Account) -> dict[str, Any]:
    order = ("error", "warning", "info")
    findings = sorted(account.findings, key=lambda finding: order.index(finding.level))
    return account.manifest | {"findings": [finding.as_dict() for finding in findings]}
