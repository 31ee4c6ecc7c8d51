"""The JSON that the ingress's routes take, as its OpenAPI document says it. vLLM checks all of it, limits the rest."""

from __future__ import annotations

from typing import Any


def takes(*fields: str) -> dict[str, Any]:
    """The JSON that a route takes, for the OpenAPI document; vLLM checks all of it."""
    kinds: dict[str, dict[str, Any]] = {
        "model": {"type": "string"},
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": ["system", "user", "assistant"]},
                    "content": {"type": "string"},
                },
            },
        },
        "prompt": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    }
    optional = {
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "stream": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 1},
        "stop": {"type": "array", "items": {"type": "string"}},
        "user": {"type": "string"},
    }
    wanted = ("model", *fields)
    properties = {name: kinds[name] for name in wanted} | (optional if {"messages", "prompt"} & set(fields) else {})
    return _body_schema({"type": "object", "required": list(wanted), "properties": properties})


def takes_feedback() -> dict[str, Any]:
    properties = {"id": {"type": "string"}, "score": {"type": "number", "minimum": 0, "maximum": 1}}
    return _body_schema({"type": "object", "required": ["id", "score"], "properties": properties})


def _body_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
