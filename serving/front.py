"""The ingress as Serve deploys it: its routes, its errors in OpenAI's shape, and who may call it from a browser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from ray import serve
from starlette.exceptions import HTTPException

from cluster import paths
from serving import openapi
from serving.errors import ApiError, failure
from serving.ingress import Ingress
from serving.limits import CHAT, COMPLETIONS
from serving.spec import IngressSpec

_ROUTES = {
    "chat": ("POST", CHAT),
    "completions": ("POST", COMPLETIONS),
    "tokenize": ("POST", "/tokenize"),
    "detokenize": ("POST", "/detokenize"),
    "models": ("GET", "/v1/models"),
    "model": ("GET", "/v1/models/{model:path}"),
    "feedback": ("POST", "/v1/feedback"),
    "health": ("GET", "/health"),
}
_AS_API_ERRORS: dict[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: lambda error: error,
    HTTPException: lambda error: ApiError(error.status_code, error.detail, error.detail.lower().replace(" ", "_")),
    RequestValidationError: lambda error: ApiError(400, str(error), "invalid_request"),
    Exception: lambda _: failure(),
}


def deployable(model: str, spec: IngressSpec) -> type:
    """The class that Serve deploys: ``Ingress`` behind a FastAPI application, with errors in OpenAI's shape."""
    app = FastAPI(title="Winnow", docs_url=None, redoc_url=None)
    if origins := list(spec.cors_origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    for kind, as_api_error in _AS_API_ERRORS.items():
        app.add_exception_handler(kind, _telling(as_api_error))
    bodies = openapi.bodies(model, spec.limits)
    routed = {
        name: app.api_route(path, methods=[verb], openapi_extra=bodies.get(name))(getattr(Ingress, name))
        for name, (verb, path) in _ROUTES.items()
    }
    return serve.ingress(app)(type("Ingress", (Ingress,), routed))


def _telling(as_api_error: Callable[[Any], ApiError]) -> Any:
    async def handler(_: Any, error: Any) -> Response:  # a plain function would take a thread for each error
        return as_api_error(error).response()

    return handler


def fingerprint(model: str, settings: dict[str, Any], listens: tuple[str, int] | None, loopback: bool) -> str:
    """Of all that a replica of the ingress has to be started anew for: its settings, and the code of this package."""
    digest = hashlib.sha256(json.dumps([model, settings, listens, loopback], sort_keys=True).encode())
    for file in sorted(paths.package("serving").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
