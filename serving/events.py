"""Server-sent events of an answer: split, looked at for what has to be counted, and otherwise passed on as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_END = b"\n\n"
_DONE = b"data: [DONE]"


@dataclass
class Stream:
    """One streamed answer, from its first event to its last.

    Args:
        show_usage: the client asked for the event with the token counts; we always do.
        keep: the events are kept, to be read as one answer.
    """

    show_usage: bool
    keep: bool
    id: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    failed: bool = False
    """vLLM told an error in the stream."""
    _rest: bytes = b""
    _kept: list[bytes] = field(default_factory=list)

    def feed(self, piece: bytes) -> bytes:
        """What of ``piece`` is to be passed on: whole events, less the token counts that nobody asked for."""
        *events, self._rest = (self._rest + piece).split(_END)
        passed = [event for event in events if self._take(event)]
        return _END.join([*passed, b""]) if passed else b""

    def _take(self, event: bytes) -> bool:
        if self.id is None:
            self.id = _id(event)
        if b'"usage":{' in event and b'"choices":[]' in event:
            self.usage = json.loads(event.removeprefix(b"data: "))["usage"]
            return self.show_usage
        if event == _DONE:
            self.done = True
        elif event.startswith(b'data: {"error"'):
            self.failed = True
        elif self.keep:
            self._kept.append(event.removeprefix(b"data: "))
        return True

    def texts(self) -> list[str]:
        """The answers, one a choice. Only of a stream that was kept."""
        found: dict[int, str] = {}
        for event in self._kept:
            for choice in json.loads(event)["choices"]:
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                found[choice["index"]] = found.get(choice["index"], "") + piece
        return [found[index] for index in sorted(found)]


def _id(event: bytes) -> str | None:
    """Of the first event, without reading all of its JSON a second time."""
    start = event.find(b'"id":"')
    return event[start + 6 : event.find(b'"', start + 6)].decode() if start >= 0 else None


def texts(answer: dict[str, Any]) -> list[str]:
    """The same of an answer that was not streamed."""
    return [
        choice.get("text") or (choice.get("message") or {}).get("content") or "" for choice in answer.get("choices", ())
    ]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
