from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainables.data.formats import Example, WrongRow, prefixed, read_rows
from trainables.data.sources import File

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def read(path: Path, *rows: object) -> list[Example | WrongRow]:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return list(read_rows(File(path.name, path).rows(), path.name))


GOOD = {
    "chat": ([CHAT, "", CHAT], ["q", "a"]),
    "alpaca": ([{"instruction": "Add", "input": "1 2", "output": "3"}], ["Add\n\n1 2", "3"]),
    "alpaca without input": ([{"instruction": "Greet", "output": "hi"}], ["Greet", "hi"]),
    "completion": ([{"prompt": "2+2", "completion": "4"}], ["2+2", "4"]),
    "completion in messages": (
        [{"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}], ["q", "a"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_every_format_becomes_a_conversation(case: str, tmp_path: Path) -> None:
    rows, contents = GOOD[case]
    examples = read(tmp_path / "rows.jsonl", *rows)
    assert [example.line for example in examples] == [number for number, row in enumerate(rows, 1) if row]
    assert examples[0].messages == [
        {"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=True)
    ]
    assert (examples[0].prompt, examples[0].answer) == (f"user: {contents[0]}", contents[1])


def test_plain_text_has_no_messages_and_no_answer(tmp_path: Path) -> None:
    (example,) = read(tmp_path / "rows.jsonl", {"text": "once upon a time"})
    assert (example.messages, example.plain, example.answer) == ([], "once upon a time", None)


BAD = {
    "broken json": ('{"messages": [', "broken_row", ["not JSON at column"]),
    "no object": ("[1]", "broken_row", ["JSON object", "list"]),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "wrong_value", ["messages[0].role", "'bot'"]),
    "empty content": ({"messages": [{"role": "user", "content": " "}]}, "empty_text", ["messages[0].content"]),
    "no content": ({"messages": [{"role": "user"}]}, "missing_field", ["messages[0].content", "['role']"]),
    "no messages": ({"messages": []}, "wrong_value", ["at least one message"]),
    "another format": ({"instruction": "x", "output": "y"}, "missing_field", ["'messages'", "instruction"]),
    "task that is no name": (CHAT | {"task": 3}, "wrong_value", ["'task'", "3"]),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_bad_row_is_told_by_its_line_and_its_fault(case: str, tmp_path: Path) -> None:
    row, fault, words = BAD[case]
    good, wrong = read(tmp_path / "chat.jsonl", CHAT, row)
    assert isinstance(good, Example)
    assert isinstance(wrong, WrongRow)
    assert (wrong.source, wrong.line, wrong.fault) == ("chat.jsonl", 2, fault)
    assert all(word in wrong.rule for word in words), wrong.rule


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n{"text": "fine too"}\n')
    rows = list(read_rows(File(path.name, path).rows(), path.name))
    assert [type(row) for row in rows] == [Example, WrongRow, Example]
    assert "UTF-8" in rows[1].rule


def test_a_wrong_first_row_does_not_decide_the_format(tmp_path: Path) -> None:
    wrong, good = read(tmp_path / "rows.jsonl", {"question": "?"}, {"prompt": "2+2", "completion": "4"})
    assert isinstance(wrong, WrongRow)
    assert isinstance(good, Example)


def test_a_task_puts_its_prefix_before_the_first_thing_a_user_says(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    examples = read(
        tmp_path / "rows.jsonl",
        {"messages": [system, *CHAT["messages"], *CHAT["messages"]], "task": "sql"},
        CHAT | {"task": "triage"},
        CHAT,
    )
    contents = [[message["content"] for message in one.messages] for one in prefixed(examples, {})]
    assert contents == [["Be brief.", "[sql] q", "a", "q", "a"], ["[triage] q", "a"], ["q", "a"]]
    named = prefixed(examples, {"sql": "Write SQL: ", "triage": ""})
    assert [one.messages[-2]["content"] for one in named] == ["q", "q", "q"]
    assert named[0].messages[1]["content"] == "Write SQL: q"
    with pytest.raises(ValueError, match=r"data\.task_prefixes: .*rows\.jsonl:2 has 'triage'.*there are sql;"):
        prefixed(examples, {"sql": "Write SQL: "})
