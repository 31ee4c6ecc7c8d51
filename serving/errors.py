"""Errors as a client of the OpenAI API expects them: one JSON shape, the right status, a time to try again."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client is told.

    Args:
        param: the field of the request that is at fault.
        retry_after_s: when to try again, for 429 and 503.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, message, code, param, retry_after_s)  # all of them: it is pickled
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)

    @property
    def event(self) -> bytes:
        """The same in a stream that has begun, as its last event."""
        return f"data: {json.dumps(self.body)}\n\n".encode()


def failure() -> ApiError:
    """A defect of ours."""
    return ApiError(500, "the ingress failed; its log says why", "internal_error")
