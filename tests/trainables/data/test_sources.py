from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainables.data import sources
from trainables.data.formats import Example, read_rows
from trainables.spec import SourceSpec

ROWS = [{"prompt": f"{number} + 1", "completion": str(number + 1)} for number in range(5)]


def read(spec: SourceSpec) -> list[Example]:
    return [row for part in sources.parts(spec, "data.sources.0.path") for row in read_rows(part.rows(), part.name)]


def test_a_directory_is_read_file_by_file_each_in_its_own_format(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "b.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pq.write_table(pa.Table.from_pylist(chat), folder / "a.parquet")
    (folder / "more" / "c.jsonl").write_text('{"text": "plain"}\n')
    (folder / ".hidden.jsonl").write_text("not a row")
    (folder / "README.md").write_text("not a row")
    examples = read(SourceSpec(path=str(folder)))
    assert [one.place for one in examples] == [
        "corpus/a.parquet:1", *(f"corpus/b.jsonl:{line}" for line in range(1, 6)), "corpus/more/c.jsonl:1",
    ]  # fmt: skip
    assert (examples[0].answer, examples[1].answer, examples[-1].plain) == ("a", "1", "plain")


def test_parquet_rows_read_as_the_same_jsonl_rows_do(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": None, "output": "hi"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    parquet, jsonl = (read(SourceSpec(path=str(tmp_path / f"rows.{kind}"))) for kind in ("parquet", "jsonl"))
    assert [(one.messages, one.line) for one in parquet] == [(one.messages, one.line) for one in jsonl]


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere.jsonl", "no such file"), ("empty", "no .jsonl or .parquet file"), ("fake.parquet", "must be a Parquet")],
)
def test_a_source_that_cannot_be_read(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.parquet").write_text("no")
    with pytest.raises(ValueError, match=words):
        read(SourceSpec(path=str(tmp_path / path)))


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "windows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [one.plain for one in read(SourceSpec(path=str(tmp_path / "windows.jsonl")))] == ["one", "two"]
