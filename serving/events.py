"""Server-sent events of an answer: split, looked at for what has to be counted, and otherwise passed on as they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_END = b"\n\n"
_DATA, _DONE, _ERROR = b"data:", b"[DONE]", b'{"error"'
_ID = re.compile(rb'"id": ?"([^"]*)"')
_ENDS = re.compile(rb'"finish_reason": ?"')


@dataclass(frozen=True)
class Told:
    """What a stream came to.

    Args:
        id: of the answer.
        usage: its token counts.
        done: it ended as it should.
        failed: what an error in it said.
        status: of that error.
        late: it took longer than it might.
        torn: a part of a chunk was written, so nothing can follow.
        cut, stopped: ``ends`` of its answers.
        first_at: when its first event was passed on, by the machine's monotonic clock.
        texts: the answers, one a choice, where they were kept.
    """

    id: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    failed: str = ""
    status: int = 0
    late: bool = False
    torn: bool = False
    cut: bool = False
    stopped: bool = False
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
    _failed: str = ""
    _status: int = 0
    _cut: bool = False
    _stopped: bool = False
    _rest: bytes = b""
    _kept: list[bytes] = field(default_factory=list)

    def feed(self, piece: bytes) -> bytes:
        """What of ``piece`` is to be passed on: whole events, less the token counts that nobody asked for."""
        rest = self._rest + piece
        if b"\r" in rest:  # an endpoint that is not vLLM; in JSON it would be escaped
            rest = rest.replace(b"\r\n", b"\n")
        *events, self._rest = rest.split(_END)
        passed = [event for event in events if self._take(event)]
        return _END.join([*passed, b""]) if passed else b""

    def _take(self, event: bytes) -> bool:
        if not event.startswith(_DATA):  # a comment, which keeps a connection open
            return True
        said = event[len(_DATA) :].lstrip()
        if self._id is None and (found := _ID.search(said)):  # without reading all of its JSON a second time
            self._id = found[1].decode()
        if b'"usage"' in said and (usage := (chunk := _object(said)).get("usage")):
            self._usage = usage if isinstance(usage, dict) else {}
            if not chunk.get("choices"):
                return self.show_usage
        if _ENDS.search(said):
            cut, stopped = ends(_object(said))
            self._cut, self._stopped = self._cut or cut, self._stopped or stopped
        if said == _DONE:
            self._done = True
        elif said.startswith(_ERROR):
            self._failed, self._status = error_in(_object(said)) or ("an error", 500)
        elif self.keep:
            self._kept.append(said)
        return True

    def told(self, first_at: float | None = None, late: bool = False, torn: bool = False) -> Told:
        """What it came to so far."""
        found: dict[int, str] = {}
        for event in self._kept:
            for choice in _object(event).get("choices") or ():
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                found[choice["index"]] = found.get(choice["index"], "") + piece
        texts = [found[index] for index in sorted(found)]
        return Told(
            self._id,
            self._usage,
            self._done,
            self._failed,
            self._status,
            late,
            torn,
            self._cut,
            self._stopped,
            first_at,
            texts,
        )


def _object(said: bytes) -> dict[str, Any]:
    """Nothing where it is no JSON: whoever sent it, the client gets it as it is."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def error_in(answer: Any) -> tuple[str, int] | None:
    """What an error of OpenAI's shape says, and its status where it has one; None where it is none."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    return str(error.get("message") or "an error"), code if isinstance(code, int) else 500


def texts(answer: dict[str, Any]) -> list[str]:
    """Of an answer that was not streamed; nothing where it is no text, as an endpoint that is not ours may have it."""
    said = [choice.get("text") or (choice.get("message") or {}).get("content") for choice in answer.get("choices", ())]
    return [text if isinstance(text, str) else "" for text in said]


def ends(answer: dict[str, Any]) -> tuple[bool, bool]:
    """Whether one of its choices, or of a stream's chunk, ended where it might not be longer, and whether one did at a
    word that the request named (vLLM's ``stop_reason``)."""
    choices = answer.get("choices") or ()
    cut = any(choice.get("finish_reason") == "length" for choice in choices)
    return cut, any(choice.get("stop_reason") is not None for choice in choices)


def is_empty(answer: dict[str, Any]) -> bool:
    """Whether one of its choices has neither a text nor a call of a tool."""
    called = [bool((choice.get("message") or {}).get("tool_calls")) for choice in answer.get("choices", ())]
    return not all(text or call for text, call in zip(texts(answer), called, strict=True))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
