"""The page on which a person reviews: on this machine alone, behind an address that cannot be guessed."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from sweeps import pages
from sweeps.reviews import Label, Sheet

Keep = Callable[[Sheet, dict[Label, int], str], None]
_HOST = "127.0.0.1"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


def serve(sheets: Sequence[Sheet], keep: Keep, port: int, log: Callable[[str], None]) -> None:
    """Show one sheet after the other until all are scored, or until the user stops it.

    Args:
        keep: takes each sheet with its scores, and which answer was better.
        port: 0 takes a free one.

    Raises:
        ValueError: the port is taken.
        KeyboardInterrupt: the user stopped it; what was scored is kept.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST, port))
        listening.listen()  # who is quicker than the server waits
    except OSError as error:
        raise ValueError(f"--port: {port} cannot be listened on: {error.strerror}; choose another") from None
    path = f"/{secrets.token_urlsafe(16)}"
    server = uvicorn.Server(uvicorn.Config("", log_level="critical", access_log=False, lifespan="off"))
    server.config.app = _Reviews(list(sheets), keep, path, server).app
    log(f"review: {len(sheets)} prompts at http://{_HOST}:{listening.getsockname()[1]}{path} (Ctrl-C to stop)")
    asyncio.run(server.serve(sockets=[listening]))
    listening.close()


class _Reviews:
    """The sheets that are left; ends the server when none is."""

    def __init__(self, sheets: list[Sheet], keep: Keep, path: str, server: uvicorn.Server) -> None:
        self.left, self.all, self.keep, self.path, self.server = sheets, len(sheets), keep, path, server
        self.app = Starlette(
            routes=[Route(path, self.show, methods=["GET"]), Route(path, self.take, methods=["POST"])],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])],
        )

    async def show(self, _: Request) -> Response:
        response = self._page()
        self.server.should_exit = not self.left
        return response

    async def take(self, request: Request) -> Response:
        """One sheet's scores. A sheet that was scored already, as by the back button, changes nothing."""
        given = {name: values[-1] for name, values in parse_qs((await request.body()).decode()).items()}
        sheet = next((one for one in self.left if one.sheet_id == given.get("sheet")), None)
        if sheet is not None:
            try:
                self.keep(sheet, {"A": int(given.get("A", 0)), "B": int(given.get("B", 0))}, given.get("better", ""))
            except ValueError as error:
                return self._page(problem=str(error), status=400)
            self.left.remove(sheet)
        return RedirectResponse(self.path, status_code=303, headers=_HEADERS)

    def _page(self, problem: str = "", status: int = 200) -> Response:
        values: dict[str, Any] = {"sheet": self.left[0] if self.left else None, "problem": problem}
        page = pages.render("review", number=self.all - len(self.left) + 1, count=self.all, **values)
        return HTMLResponse(page, status_code=status, headers=_HEADERS)
