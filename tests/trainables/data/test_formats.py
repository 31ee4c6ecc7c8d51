from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainables.data.formats import read_examples

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_chat_and_alpaca_are_told_apart_by_file(tmp_path: Path) -> None:
    chat = read_examples(write(tmp_path / "chat.jsonl", CHAT, "", CHAT))
    alpaca = read_examples(
        write(
            tmp_path / "alpaca.jsonl",
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Greet", "output": "hi"},
        )
    )
    assert [example.line for example in chat] == [1, 3]
    assert alpaca[0].messages == [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert alpaca[1].messages[0]["content"] == "Greet"


BAD = {
    "broken json": ('{"messages": [', ["not JSON at column"]),
    "no object": ("[1]", ["JSON object", "list"]),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, ["messages[0].role", "'bot'"]),
    "empty content": ({"messages": [{"role": "user", "content": " "}]}, ["messages[0].content"]),
    "no messages": ({"messages": []}, ["at least one message"]),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_bad_row_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    row, words = BAD[case]
    with pytest.raises(ValueError, match=r"chat\.jsonl:2: ") as error:
        read_examples(write(tmp_path / "chat.jsonl", CHAT, row))
    assert all(word in str(error.value) for word in words), error.value


def test_an_alpaca_row_without_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: 'output' must be text"):
        read_examples(write(tmp_path / "a.jsonl", {"instruction": "Add"}))


def test_every_bad_row_is_named_the_first_ten_in_full(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"and 5 more wrong rows of .*chat\.jsonl, on lines 12-14, 16, 19$") as error:
        read_examples(write(tmp_path / "chat.jsonl", CHAT, *["{"] * 13, CHAT, "{", CHAT, CHAT, "{"))
    assert str(error.value).count("chat.jsonl:") == 10


def test_empty_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        read_examples(write(tmp_path / "chat.jsonl", "", "  "))
