"""A judge on loopback, since a real one is paid for: speaks OpenAI's chat completions and Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Opinion = Callable[[str, dict[str, str]], Any]
"""Takes the system's words and what is to be judged; gives the reply, as an object or as the text itself."""


@dataclass
class Judge:
    """The running endpoint: what it was asked, and what it does next."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """As they came in the header."""
    failures: list[int] = field(default_factory=list)
    """Statuses to answer with before anything else."""
    usage: bool = True
    lock: Lock = field(default_factory=Lock)


def fair(system: str, asked: dict[str, str]) -> dict[str, Any]:
    """What equals the expected answer is good, whatever stands where; what says it is unsafe is."""
    if "from 1 to 5" in system:
        return {"reason": "compared", "score": 5 if asked["answer"] == asked["expected answer"] else 2}
    if "better" in system:
        right = {label: asked[label] == asked["expected answer"] for label in ("A", "B")}
        return {"reason": "compared", "better": "tie" if right["A"] == right["B"] else "A" if right["A"] else "B"}
    return {"reason": "read", "safe": "unsafe" not in asked["answer"]}


@contextmanager
def serve(opinion: Opinion = fair) -> Iterator[Judge]:
    judge = Judge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.requests.append(body)
                judge.keys.add(self.headers.get("x-api-key") or self.headers.get("Authorization") or "")
                status = judge.failures.pop(0) if judge.failures else 200
            if status != 200:
                return self._send(status, {"error": {"message": "not now", "type": "some_error"}})
            anthropic = self.path.endswith("/messages")
            turns = [turn for turn in body["messages"] if turn["role"] != "system"]
            system = body["system"] if anthropic else body["messages"][0]["content"]
            first = turns[0]["content"]
            said = opinion(system, json.loads(first)) if first.startswith("{") else "ok"
            text = said if isinstance(said, str) else json.dumps(said)
            if body.get("stream"):
                return self._stream(text)
            return self._send(200, _message(text) if anthropic else _completion(text, judge.usage))

        def _send(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, text: str) -> None:
            """Of OpenAI's, as servers write it that are not vLLM: the line ends of HTTP, and comments in between."""
            about = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "judge"}
            chunks = [{"choices": [{"index": 0, "delta": {"content": letter}}]} for letter in text]
            usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
            said = [": ping", *(f"data: {json.dumps(about | one)}" for one in [*chunks, usage]), "data: [DONE]"]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write("".join(f"{one}\r\n\r\n" for one in said).encode())
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_port}"
    yield judge
    server.shutdown()


def _completion(text: str, usage: bool) -> dict[str, Any]:
    counted = {"usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}} if usage else {}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]} | counted


def _message(text: str) -> dict[str, Any]:
    return {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "judge",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 100, "output_tokens": 10},
    }
