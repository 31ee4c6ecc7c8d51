"""Rows of a user's JSONL file to chat messages. Chat and alpaca, detected per file; a bad row is named by its line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One training conversation, and the file and line that it came from."""

    messages: Messages
    source: str
    line: int

    @property
    def text(self) -> str:
        """All that was said, as one string: what duplicates are compared by."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read_examples(path: Path) -> list[Example]:
    """All rows of a JSONL file.

    Raises:
        ValueError: the file is empty, or rows of it are wrong: every wrong row is named, the first ten with what is
            wrong with them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text, but byte {error.start} is not") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: must hold at least one row, but it is empty")
    parse, examples, wrong = None, [], dict[int, str]()
    for number, line in numbered:
        try:
            row = _row(line)
            parse = parse or _detect(row)
            examples.append(Example(parse(row), path.name, number))
        except ValueError as error:
            wrong[number] = str(error)
    if wrong:
        raise ValueError(_named(path, wrong))
    return examples


def _named(path: Path, wrong: dict[int, str], in_full: int = 10) -> str:
    """All wrong rows on one line: the first with their errors, the others by their line numbers."""
    numbers = list(wrong)
    told = [f"{path}:{number}: {wrong[number]}" for number in numbers[:in_full]]
    if rest := numbers[in_full:]:
        told.append(f"and {len(rest)} more wrong rows of {path}, on lines {_ranges(rest)}")
    return "; ".join(told)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers in short: ``3, 7-9``."""
    known = set(numbers)
    starts = [number for number in numbers if number - 1 not in known]
    ends = [number for number in numbers if number + 1 not in known]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be one JSON object a line, but it is not JSON at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, but got a {type(row).__name__}")
    return row


def _detect(row: dict[str, Any]):
    """The parser of the file's format, by its first row."""
    if "messages" in row:
        return _chat
    if "instruction" in row:
        return _alpaca
    raise ValueError(f"must have 'messages' (chat) or 'instruction' and 'output' (alpaca), but has {sorted(row)}")


def _chat(row: dict[str, Any]) -> Messages:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    return [_message(message, index) for index, message in enumerate(messages)]


def _message(message: Any, index: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"messages[{index}] must be an object, but got {message!r}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}, but got {role!r}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"messages[{index}].content must be text that is not empty, but got {content!r}")
    return {"role": role, "content": content}


def _alpaca(row: dict[str, Any]) -> Messages:
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"'{field}' must be text that is not empty, but got {row.get(field)!r}")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError(f"'input' must be text, but got {extra!r}")
    prompt = f"{row['instruction']}\n\n{extra}" if extra.strip() else row["instruction"]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]
