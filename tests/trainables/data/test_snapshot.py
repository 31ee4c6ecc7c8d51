from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainables import base
from trainables.data import prepare, snapshot
from trainables.data.duplicates import find_duplicates
from trainables.spec import BaseModelSpec, DataSpec, SourceSpec


@pytest.fixture
def tokenizer(home: Path):
    return base.load_tokenizer(BaseModelSpec(model_name_or_path=str(home / "bases" / "tiny")))


def spec(home: Path, **changes) -> DataSpec:
    tickets = home / "sources" / "tickets"
    values = {
        "sources": (SourceSpec(path=str(tickets / "tickets.jsonl")),
                    SourceSpec(path=str(tickets / "general-train.jsonl"), splits="train")),
        "general": str(tickets / "general-test.jsonl"),
        "max_length": 128,
        "min_examples": 50,
    }  # fmt: skip
    return DataSpec(**values | changes)


def test_splits_share_no_twin_and_hold_every_planted_duplicate_once(home: Path, tokenizer) -> None:
    made = prepare.prepare(spec(home), tokenizer)
    rows = [(split, row) for split in snapshot.SPLITS for row in made.rows(split)]
    texts = ["\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]) for _, row in rows]
    crossing = [
        (rows[one.index][0], rows[one.of][0])
        for one in find_duplicates(texts, 0.85)
        if "general" not in (rows[one.index][0], rows[one.of][0])
    ]
    assert crossing == []
    assert made.manifest["duplicates"]["near"] >= 12


def test_train_only_sources_stay_out_of_eval_and_test(home: Path, tokenizer) -> None:
    made = prepare.prepare(spec(home), tokenizer)
    for split in ("eval", "test"):
        assert all(row["source"].startswith("tickets.jsonl") for row in made.rows(split))
    assert any(row["source"].startswith("general-train") for row in made.rows("train"))


def test_what_the_search_may_see_stays_out_of_test_alone(home: Path, tokenizer) -> None:
    tickets, general = spec(home).sources
    mixed = spec(home, sources=(tickets, general.model_copy(update={"splits": "train_eval"})), eval_size=0.25)
    made = prepare.prepare(mixed, tokenizer)
    sources = {split: [row["source"].split(".")[0] for row in made.rows(split)] for split in ("train", "eval", "test")}
    assert set(sources["train"]) == set(sources["eval"]) == {"tickets", "general-train"}
    assert set(sources["test"]) == {"tickets"}
    everywhere = sum(split.count("general-train") for split in sources.values())
    assert sources["eval"].count("general-train") == round(everywhere * 0.25)


def test_only_the_assistants_tokens_are_labelled(home: Path, tokenizer) -> None:
    row = prepare.prepare(spec(home), tokenizer).rows("test")[0]
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned) == row["messages"][-1]["content"] + "<|end|>"
    everything = prepare.prepare(spec(home), tokenizer, completion_only=False).rows("test")[0]
    assert everything["labels"] == everything["input_ids"]


def test_the_same_input_has_the_same_hash_and_another_seed_has_not(home: Path, tokenizer, tmp_path: Path) -> None:
    first = prepare.prepare(spec(home), tokenizer)
    assert prepare.prepare(spec(home), tokenizer).dataset_hash == first.dataset_hash
    assert prepare.prepare(spec(home, seed=1), tokenizer).dataset_hash != first.dataset_hash
    assert len(list((home / "datasets").glob("[!.]*"))) == 2


def test_over_long_examples_are_cut_and_counted(home: Path, tokenizer) -> None:
    made = prepare.prepare(spec(home, max_length=60), tokenizer)
    assert sum(split["over_long"] for split in made.manifest["splits"].values()) > 0
    assert max(len(row["input_ids"]) for row in made.rows("train")) == 60


def test_an_example_with_nothing_to_train_stops_the_run(home: Path, tokenizer) -> None:
    with pytest.raises(ValueError, match="no trained token left") as error:
        prepare.prepare(spec(home, max_length=10), tokenizer)
    assert "max_length=10" in str(error.value)
    assert not list((home / "datasets").glob("*"))


def test_too_little_data_to_split(home: Path, tokenizer, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    few.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"1 distinct examples are too few to split: they give 0 for eval"):
        prepare.prepare(spec(home, sources=(SourceSpec(path=str(few)),)), tokenizer)


def test_a_template_without_generation_markers(home: Path, tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no {% generation %} markers"):
        prepare.prepare(spec(home), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prepare.prepare(spec(home), tokenizer, completion_only=False)
