"""Answered requests kept to be looked at, or trained on: a share of them, without personal data, where it is asked for.

One file a day, a line a conversation, in the chat format that ``sweeps`` takes as data.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from cluster import paths
from serving import limits
from serving.spec import SamplingSpec

_MOST_CHARS = 16_000
"""Of a conversation: some patterns take a time that grows with the square of a text made for it, half a second of that
many, in which nothing else of this process runs."""


class Sampler:
    """Of one ingress replica. What it takes is redacted and written in a thread, after the answer."""

    def __init__(self, model: str, spec: SamplingSpec) -> None:
        from cluster.personal import Recogniser  # two seconds, for those who sample

        self._model, self._spec, self._recogniser = model, spec, Recogniser(regions=spec.regions)
        self._writing: set[asyncio.Task[None]] = set()
        self._room, self._since = 0.0, time.monotonic()

    def wants(self) -> bool:
        """Whether the request that begins now is to be kept."""
        now, most = time.monotonic(), self._spec.max_per_minute
        self._room = min(max(1.0, most), self._room + (now - self._since) * most / 60)
        self._since = now
        if random.random() >= self._spec.share or self._room < 1:
            return False
        self._room -= 1
        return True

    def take(self, body: dict[str, Any], answers: Sequence[str], **about: Any) -> None:
        """Keep what was asked and answered, and ``about`` it as it is; nothing where it is very long."""
        if sum(map(len, [*limits.texts(body), *answers])) > _MOST_CHARS:
            return
        task = asyncio.create_task(asyncio.to_thread(self._write, body, answers, about))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def _write(self, body: dict[str, Any], answers: Sequence[str], about: dict[str, Any]) -> None:
        from cluster.personal import Redaction

        now, redact = datetime.now(UTC), Redaction(self._recogniser)
        line = {"at": now.isoformat(timespec="seconds")} | about | conversation(body, answers, redact)
        file = paths.samples_file(self._model, f"{now:%Y-%m-%d}")
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab", buffering=0) as stream:  # one write a line: replicas share the file
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def conversation(body: dict[str, Any], answers: Sequence[str], redact: Callable[[str], str]) -> dict[str, Any]:
    """The texts of a request and the first of its answers as ``messages``; further answers, if any, beside them.

    Of messages only roles and texts stay: no picture, no tool, no name.
    """
    asked = body.get("messages")
    if asked is None:
        asked = [{"role": "user", "content": body.get("prompt")}]
    turns = [{"role": turn["role"], "content": redact(_text(turn.get("content")))} for turn in asked]
    first, *others = [redact(answer) for answer in answers]
    more = {"other_answers": others} if others else {}
    return {"messages": [*turns, {"role": "assistant", "content": first}]} | more


def _text(content: Any) -> str:
    """Of a message or a prompt: its text, its parts' texts, or nothing where it is tokens."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str))
