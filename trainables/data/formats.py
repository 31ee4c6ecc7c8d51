"""Rows of a user's file to examples: the format is detected per file, and a bad row is told by its fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]
Row = dict[str, Any]
Fault = Literal["broken_row", "missing_field", "empty_text", "wrong_value"]


class RowError(ValueError):
    """A row that breaks its format's rules."""

    def __init__(self, fault: Fault, rule: str) -> None:
        super().__init__(fault, rule)
        self.fault: Fault = fault
        self.rule = rule


@dataclass(frozen=True)
class WrongRow:
    """Where a row that breaks the rules stands, and which rule it breaks."""

    source: str
    line: int
    fault: Fault
    rule: str


@dataclass(frozen=True)
class Example:
    """One conversation, or one plain text to go on learning from, and the file and line that it came from."""

    messages: Messages
    source: str
    line: int
    plain: str | None = None
    """The text of a row of plain text, which has no messages."""
    task: str | None = None

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"

    @property
    def text(self) -> str:
        """All that was said, as one string: what duplicates are compared by."""
        return self.plain or _said(self.messages)

    @property
    def prompt(self) -> str:
        """What the assistant's last answer answers; the whole text where there is no answer."""
        return self.plain or _said(self.messages[:-1] if self.answer is not None else self.messages)

    @property
    def answer(self) -> str | None:
        """What the assistant says last; None in plain text, and where somebody else has the last word."""
        last = self.messages[-1] if self.messages else None
        return last["content"] if last and last["role"] == "assistant" else None

    def with_texts(self, change: Callable[[str], str]) -> Example:
        """The same example with ``change`` made to each text in it."""
        if self.plain is not None:
            return replace(self, plain=change(self.plain))
        return replace(self, messages=[message | {"content": change(message["content"])} for message in self.messages])

    def with_prefix(self, prefix: str) -> Example:
        """The same example with ``prefix`` before what the user says first, or before plain text."""
        if self.plain is not None:
            return replace(self, plain=prefix + self.plain)
        first = next((index for index, message in enumerate(self.messages) if message["role"] == "user"), None)
        messages = [
            message | {"content": prefix + message["content"]} if index == first else message
            for index, message in enumerate(self.messages)
        ]
        return replace(self, messages=messages)


def _said(messages: Messages) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def read_rows(rows: Iterable[tuple[int, Row | RowError]], source: str) -> Iterator[Example | WrongRow]:
    """The rows of one file, numbered, as examples; the first row that has a known format decides for all of them."""
    parse: Callable[[Row], tuple[Messages, str | None]] | None = None
    for line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            parse = parse or _detect(row)
            messages, plain = parse(row)
            yield Example(messages, source, line, plain, _task(row))
        except RowError as error:
            yield WrongRow(source, line, error.fault, error.rule)


def prefixed(examples: Iterable[Example], prefixes: Mapping[str, str]) -> list[Example]:
    """Examples with a task get its prefix: the one named for it, or ``[TASK]`` where none is named for any.

    Raises:
        ValueError: prefixes are named, but not for a task that a row has.
    """
    return [example if example.task is None else _prefixed(example, example.task, prefixes) for example in examples]


def _prefixed(example: Example, task: str, prefixes: Mapping[str, str]) -> Example:
    if prefixes and task not in prefixes:
        raise ValueError(
            f"data.task_prefixes: must have every task of the rows, but {example.place} has {task!r} and there are "
            f"{', '.join(sorted(prefixes))}; add it, or remove task_prefixes"
        )
    return example.with_prefix(prefixes.get(task, f"[{task}] "))


def _task(row: Row) -> str | None:
    task = row.get("task")
    if task is not None and not (isinstance(task, str) and task.strip()):
        raise RowError("wrong_value", f"'task' must be a name, but got {task!r}")
    return task


def _detect(row: Row) -> Callable[[Row], tuple[Messages, str | None]]:
    """The parser of the file's format, by its first row."""
    for field, parse in (("messages", _chat), ("instruction", _alpaca), ("prompt", _completion), ("text", _plain)):
        if field in row:
            return parse
    raise RowError(
        "missing_field",
        f"must have 'messages' (chat), 'instruction' and 'output' (alpaca), 'prompt' and 'completion', or 'text', "
        f"but has {sorted(row)}",
    )


def _chat(row: Row) -> tuple[Messages, None]:
    return _messages(row, "messages"), None


def _alpaca(row: Row) -> tuple[Messages, None]:
    instruction, output, extra = _text(row, "instruction"), _text(row, "output"), row.get("input") or ""
    if not isinstance(extra, str):
        raise RowError("wrong_value", f"'input' must be text, but got {extra!r}")
    return _turn(f"{instruction}\n\n{extra}" if extra.strip() else instruction, output), None


def _completion(row: Row) -> tuple[Messages, None]:
    """Both sides as text, or, as trl takes them too, both as lists of messages."""
    if isinstance(row.get("prompt"), list):
        return [*_messages(row, "prompt"), *_messages(row, "completion")], None
    return _turn(_text(row, "prompt"), _text(row, "completion")), None


def messages_of(row: Row) -> Messages:
    """What is asked in a row that has a ``prompt`` or, as in a chat, ``messages``.

    Raises:
        RowError: it has neither, or one that is not of its kind.
    """
    if "messages" in row:
        return _messages(row, "messages")
    return [{"role": "user", "content": _text(row, "prompt")}]


def _plain(row: Row) -> tuple[Messages, str]:
    return [], _text(row, "text")


def _turn(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(row: Row, field: str, place: str | None = None) -> str:
    place, value = place or f"'{field}'", row.get(field)
    if value is None:
        raise RowError("missing_field", f"{place} must be text that is not empty, but there are {sorted(row)}")
    if not isinstance(value, str):
        raise RowError("wrong_value", f"{place} must be text that is not empty, but got {value!r}")
    if not value.strip():
        raise RowError("empty_text", f"{place} must be text that is not empty, but got {value!r}")
    return value


def _messages(row: Row, field: str) -> Messages:
    messages = row.get(field)
    if messages is None:
        raise RowError("missing_field", f"'{field}' must be there, but the row has {sorted(row)}")
    if not isinstance(messages, list) or not messages:
        raise RowError("wrong_value", f"'{field}' must be a list of at least one message")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError("wrong_value", f"{place} must be an object, but got {message!r}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError("wrong_value", f"{place}.role must be one of {', '.join(ROLES)}, but got {role!r}")
    return {"role": role, "content": _text(message, "content", f"{place}.content")}
