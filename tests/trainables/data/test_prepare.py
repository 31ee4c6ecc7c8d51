from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def mixed(home: Path, tmp_path: Path, **changes) -> DataSpec:
    """Tickets, a plain text of many rows, and tasks, each a file of its own format."""
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "the quick fox jumps over the lazy dog " * 40}) + "\n")
    sums = [{"prompt": f"{n} + {n}", "completion": str(2 * n), "task": "sum"} for n in range(1, 21)]
    pq.write_table(pa.Table.from_pylist(sums), tmp_path / "sums.parquet")
    tickets = SourceSpec(path=str(home / "sources" / "tickets" / "tickets.jsonl"))
    others = (SourceSpec(path=str(tmp_path / name), splits="train", tag=tag)
              for name, tag in (("book.jsonl", "plain"), ("sums.parquet", "tasks")))  # fmt: skip
    return DataSpec(**{"sources": (tickets, *others), "max_length": 128, "min_examples": 50} | changes)


def test_plain_text_goes_on_in_the_next_row_and_every_token_of_it_is_learned(home: Path, tokenizer, tmp_path) -> None:
    made = prepare.prepare(mixed(home, tmp_path), tokenizer)
    rows = [row for row in made.rows("train") if row["source"] == "book.jsonl:1"]
    text = "the quick fox jumps over the lazy dog " * 40
    assert len(rows) > 2
    assert all(row["messages"] == [] and len(row["input_ids"]) <= 128 for row in rows)
    assert all(row["input_ids"][0] == tokenizer.bos_token_id and row["labels"][0] == -100 for row in rows)
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in rows)
    learned = [token for row in rows for token in row["input_ids"][1:]]
    assert tokenizer.decode(learned) == text + "<|end|>"
    train = made.manifest["splits"]["train"]
    assert train["rows"] == train["examples"] + len(rows) - 1
    assert train["answers"] == train["examples"] - 1
    assert made.manifest["splits"]["train"]["over_long"] == 0


def test_a_task_stands_before_its_prompt_in_what_is_trained(home: Path, tokenizer, tmp_path: Path) -> None:
    made = prepare.prepare(mixed(home, tmp_path, task_prefixes={"sum": "Add up: "}), tokenizer)
    prompts = {row["messages"][0]["content"] for row in made.rows("train") if row["source"].startswith("sums")}
    assert prompts <= {f"Add up: {n} + {n}" for n in range(1, 21)}
    assert len(prompts) > 5


def test_every_step_and_every_source_is_in_the_manifest(home: Path, tokenizer, tmp_path: Path) -> None:
    manifest = prepare.prepare(mixed(home, tmp_path), tokenizer).manifest
    steps = [step["step"] for step in manifest["steps"]]
    assert steps == ["read", "read", "read", "personal_data", "deduplicate", "mix", "split", "tokenise"]
    assert [step["in"] for step in manifest["steps"][3:]] == [153, 153, *[manifest["steps"][4]["out"]] * 3]
    for source, path in zip(manifest["sources"], ("tickets.jsonl", "book.jsonl", "sums.parquet"), strict=True):
        assert source["name"] == path
        assert len(source["sha256"]) == 64
    assert sum(share["examples"] for share in manifest["shares"].values()) == manifest["splits"]["train"]["examples"]
    assert sum(manifest["lengths"]["counts"]) == sum(split["rows"] for split in manifest["splits"].values())


def test_only_plain_text_needs_no_chat_template(home: Path, tokenizer, tmp_path: Path) -> None:
    words = Path(home / "sources" / "tickets" / "tickets.jsonl").read_text().splitlines()
    texts = [json.dumps({"text": json.loads(line)["messages"][0]["content"]}) for line in words]
    (tmp_path / "plain.jsonl").write_text("\n".join(texts))
    tokenizer.chat_template = None
    made = prepare.prepare(mixed(home, tmp_path, sources=(SourceSpec(path=str(tmp_path / "plain.jsonl")),)), tokenizer)
    assert made.answers("test") == 0
    assert made.count("test") > 5
