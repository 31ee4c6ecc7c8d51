"""The JSON that the ingress's routes take, as its OpenAPI document says it. vLLM checks all of it, limits the rest."""

from __future__ import annotations

from typing import Any

from serving.spec import LimitsSpec

_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_SCORE = {"type": "number", "minimum": 0, "maximum": 1}


def bodies(model: str, limits: LimitsSpec) -> dict[str, dict[str, Any]]:
    """By route, what FastAPI adds to its description."""
    name = {"type": "string", "examples": [model, f"{model}@production"], "pattern": f"^{model}(@.+)?$"}
    generation = {
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": limits.max_tokens},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "stream": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 1, "maximum": limits.max_n},
        "stop": {"type": "array", "items": {"type": "string"}, "maxItems": limits.max_stop_strings},
        "user": {"type": "string"},
    }
    prompt = {"type": "string", "minLength": 1, "maxLength": limits.max_prompt_chars}
    messages = {"type": "array", "minItems": 1, "items": _MESSAGE}
    return {
        "chat": _body({"model": name, "messages": messages}, generation),
        "completions": _body({"model": name, "prompt": prompt}, generation),
        "tokenize": _body({"model": name, "prompt": prompt}),
        "detokenize": _body({"model": name, "tokens": _TOKENS}),
        "feedback": _body({"id": {"type": "string"}, "score": _SCORE}),
    }


def _body(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    schema = {"type": "object", "required": list(required), "properties": required | (optional or {})}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
