"""Server-sent events of an answer: split, looked at for what has to be counted, and otherwise passed on as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_END = b"\n\n"
_DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Told:
    """What a stream came to.

    Args:
        id: of the answer.
        usage: its token counts.
        done: it ended as it should.
        failed: vLLM told an error in it.
        late: it took longer than it might.
        first_at: when its first event was passed on, by the machine's monotonic clock.
        texts: the answers, one a choice, where they were kept.
    """

    id: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    failed: bool = False
    late: bool = False
    first_at: float | None = None
    texts: list[str] = field(default_factory=list)


@dataclass
class Stream:
    """One streamed answer, from its first event to its last.

    Args:
        show_usage: the client asked for the event with the token counts; we always do.
        keep: the events are kept, to be read as one answer.
    """

    show_usage: bool
    keep: bool
    _id: str | None = None
    _usage: dict[str, Any] = field(default_factory=dict)
    _done: bool = False
    _failed: bool = False
    _rest: bytes = b""
    _kept: list[bytes] = field(default_factory=list)

    def feed(self, piece: bytes) -> bytes:
        """What of ``piece`` is to be passed on: whole events, less the token counts that nobody asked for."""
        *events, self._rest = (self._rest + piece).split(_END)
        passed = [event for event in events if self._take(event)]
        return _END.join([*passed, b""]) if passed else b""

    def _take(self, event: bytes) -> bool:
        if self._id is None:
            self._id = _id(event)
        if b'"usage":{' in event and b'"choices":[]' in event:
            self._usage = json.loads(event.removeprefix(b"data: "))["usage"]
            return self.show_usage
        if event == _DONE:
            self._done = True
        elif event.startswith(b'data: {"error"'):
            self._failed = True
        elif self.keep:
            self._kept.append(event.removeprefix(b"data: "))
        return True

    def told(self, first_at: float | None = None, late: bool = False) -> Told:
        """What it came to so far."""
        return Told(self._id, self._usage, self._done, self._failed, late, first_at, self._texts())

    def _texts(self) -> list[str]:
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
