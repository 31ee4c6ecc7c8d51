"""A model hub on loopback: one directory as one repository at one commit, in as much of HTTP as clients ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repository: str, directory: Path, kind: str = "models") -> Iterator[tuple[str, list[str]]]:
    """The hub's address, for ``HF_ENDPOINT``, and the files that it has handed out so far.

    Args:
        kind: ``models`` or ``datasets``, as the hub's own addresses have it.
    """
    handed: list[str] = []
    resolve = f"/{'datasets/' if kind == 'datasets' else ''}{repository}/resolve/{COMMIT}/"
    info = f"/api/{kind}/{repository}"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_POST(self) -> None:
            """Which of the named paths there are: all that a client posts."""
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            named = [entry for entry in self._tree() if entry["path"] in asked["paths"]]
            self._send(200, json.dumps(named).encode(), with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            file = directory / path.removeprefix(resolve)
            if path.startswith(resolve) and file.is_file():
                content = file.read_bytes()
                handed.extend([file.name] if with_body else [])
                self._send(200, content, with_body, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
            elif path in (info, f"{info}/revision/{COMMIT}"):
                siblings = [{"rfilename": one.name} for one in directory.iterdir()]
                self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
            elif path.startswith(f"{info}/tree/{COMMIT}"):
                self._send(200, json.dumps(self._tree()).encode(), with_body)
            else:
                known = path.startswith((resolve, info))
                self._send(404, b"", False, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        def _tree(self) -> list[dict[str, object]]:
            return [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0" * 40}
                for one in directory.iterdir()
            ]

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handed
    server.shutdown()
