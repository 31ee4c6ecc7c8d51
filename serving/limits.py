"""What a request may ask for: pure checks of its JSON, before anything of it reaches the engine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from serving.errors import ApiError
from serving.spec import LimitsSpec

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_REFUSED = {
    "chat_template": "the model's own chat template is used",
    "prompt_embeds": "give a prompt as text",
    "kv_transfer_params": "it is for engines among themselves",
    "ec_transfer_params": "it is for engines among themselves",
    "vllm_xargs": "it is for the engine's own settings",
    "logits_processors": "it would name code to run",
    "mm_processor_kwargs": "it is for the engine's own settings",
}
_SCHEMAS = ("tools", "functions")
_PROMPTS = ("messages", "prompt", "suffix", "documents", "chat_template_kwargs", "tokens")
_MOST_OF_AN_ID = 64
"""Characters: vLLM writes it into every event of a stream."""
_OF_COMPLETIONS = 16
"""Tokens of ``/v1/completions`` where nobody says how many."""
_CHARS = 4
"""Of a token, about."""
_MOST_LEVELS = 100
"""Of a body's JSON: no honest one comes near it, and whoever walks through one needs no care."""


def parse(raw: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        ApiError: 400, it is none, or has what JSON does not have (NaN, half of a surrogate pair).
    """
    try:
        body = json.loads(raw, parse_constant=_no_number)
        raw.decode()
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
        if _depth(body) > _MOST_LEVELS:
            raise RecursionError
    except RecursionError:
        raise ApiError(
            400, f"the body must be at most {_MOST_LEVELS} levels deep, but is deeper", "invalid_json"
        ) from None
    except ValueError as error:
        raise ApiError(400, f"the body must be a JSON object, but is not: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, but is a {type(body).__name__}", "invalid_json")
    return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def check(body: dict[str, Any], limits: LimitsSpec) -> None:
    """
    Raises:
        ApiError: 400; a field is refused or beyond its limit.
    """
    for name, reason in _REFUSED.items():
        if body.get(name) is not None:
            raise ApiError(400, f"{name} is not taken in a request; {reason}", "unsupported_parameter", name)
    _check_types(body)
    _check_logprobs(body, limits)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        _at_most(body, name, limits.max_tokens)
    for name in ("n", "best_of"):
        _at_most(body, name, limits.max_n)
    _check_prompts(body, limits)
    _check_stop(body.get("stop"), limits)
    try:
        for name, schema in _schemas(body):
            _check_schema(name, schema, limits)
    except RecursionError:  # of one that is a text; the body itself is not so deep
        most = f"at most {limits.max_schema_depth} levels"
        told = f"structured_outputs must be {most} deep, but is deeper"
        raise ApiError(400, told, "limit_exceeded", "structured_outputs") from None


def _check_types(body: dict[str, Any]) -> None:
    """Of what is looked at here, or makes vLLM fail rather than refuse."""
    if not isinstance(body.get("stream"), bool | None):
        raise _of_another_type("stream", "true or false", body["stream"])
    if not isinstance(identity := body.get("request_id"), str | None) or len(identity or "") > _MOST_OF_AN_ID:
        raise _of_another_type("request_id", f"a text of at most {_MOST_OF_AN_ID} characters", identity)
    if not isinstance(body.get("structured_outputs"), dict | None):
        raise _of_another_type("structured_outputs", "an object", body["structured_outputs"])
    tools = body.get("tools")
    named = isinstance(tools, list | None) and all(isinstance(_function(one).get("name"), str) for one in tools or ())
    if not named:
        raise _of_another_type("tools", "a list of objects, each with the name of its function", tools)


def _check_logprobs(body: dict[str, Any], limits: LimitsSpec) -> None:
    """Those of a prompt are as many as its tokens times the vocabulary, all at once: gigabytes beside the cache."""
    echoed = bool(body.get("echo")) and body.get("logprobs") not in (None, False)
    if limits.prompt_logprobs or (body.get("prompt_logprobs") is None and not echoed):
        return
    name = "echo" if echoed else "prompt_logprobs"
    told = "log-probabilities of a prompt are not given here: leave out prompt_logprobs, and echo beside logprobs"
    raise ApiError(400, told, "unsupported_parameter", name)


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def _at_most(body: dict[str, Any], name: str, most: int) -> None:
    value = body.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _of_another_type(name, "a whole number", value)
    if value < 0:
        raise ApiError(400, f"{name} must be at least 0, but got {value}", "limit_exceeded", name)
    if value > most:
        raise _beyond(name, value, most)


def _of_another_type(name: str, wanted: str, value: Any) -> ApiError:
    """vLLM would read a number in a text, or a 1 as true: what was not looked at here."""
    got = textwrap.shorten(json.dumps(value)[:200], 40)
    return ApiError(400, f"{name} must be {wanted}, but got {got}", "invalid_type", name)


def _beyond(name: str, value: int, most: int, unit: str = "") -> ApiError:
    return ApiError(400, f"{name} must be at most {most}{unit}, but got {value}", "limit_exceeded", name)


def _check_prompts(body: dict[str, Any], limits: LimitsSpec) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > limits.max_n:
        raise _beyond("prompt", len(prompt), limits.max_n, " prompts")
    for name in _PROMPTS:
        if (length := sum(map(len, _texts(body.get(name))))) > limits.max_prompt_chars:
            raise _beyond(name, length, limits.max_prompt_chars, " characters")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a prompt, and as many characters for a token as it has, about. vLLM reads 1.0 as one, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float):
        yield " " * _CHARS
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _check_stop(stop: Any, limits: LimitsSpec) -> None:
    strings = stop if isinstance(stop, list) else [stop] if stop else []
    if len(strings) > limits.max_stop_strings:
        raise _beyond("stop", len(strings), limits.max_stop_strings, " strings")
    if (length := sum(len(one) for one in strings if isinstance(one, str))) > limits.max_stop_chars:
        raise _beyond("stop", length, limits.max_stop_chars, " characters")


def most_tokens(body: dict[str, Any], path: str, limits: LimitsSpec) -> int:
    """What its answers may take, and about what its prompts do. Of the fields that say how long an answer may be, only
    the route's own count: vLLM reads no others."""
    asked, prompts = [body.get("max_tokens"), _OF_COMPLETIONS], 1
    if path == CHAT:
        asked = [body.get("max_completion_tokens"), body.get("max_tokens"), limits.max_tokens]
    elif isinstance(prompt := body.get("prompt"), list) and prompt and isinstance(prompt[0], str | list):
        prompts = len(prompt)
    each: int = next(value for value in asked if value is not None)
    return each * prompts * (body.get("n") or 1) + sum(map(len, texts(body))) // _CHARS


def texts(body: dict[str, Any]) -> Iterator[str]:
    """Every text of its prompts."""
    for name in _PROMPTS:
        yield from _texts(body.get(name))


def holds_to_a_form(body: dict[str, Any]) -> bool:
    """Whether the answer is held to what a schema, a grammar or a tool allows."""
    form = body.get("response_format")
    typed = isinstance(form, dict) and form.get("type") in ("json_object", "json_schema", "structural_tag")
    forced = body.get("tool_choice") not in (None, "none", "auto")
    return typed or forced or bool(body.get("structured_outputs"))


def _schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything that becomes a grammar, by its name."""
    yield from ((name, body.get(name)) for name in _SCHEMAS)
    if isinstance(form := body.get("response_format"), dict):
        yield "response_format", {name: value for name, value in form.items() if name != "type"}
    if isinstance(wanted := body.get("structured_outputs"), dict):
        for name, value in wanted.items():
            yield f"structured_outputs.{name}", _seen_through(name, value)


class _Regex(str):
    """A regular expression, which has a limit of its own."""


def _seen_through(name: str, value: Any) -> Any:
    """A part of ``structured_outputs``; a schema that is given as a text, as the object that it means."""
    if not isinstance(value, str):
        return value
    if name == "regex":
        return _Regex(value)
    if name not in ("json", "structural_tag"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise _of_another_type(f"structured_outputs.{name}", "JSON", value) from None


def _check_schema(name: str, schema: Any, limits: LimitsSpec) -> None:
    if isinstance(schema, _Regex):
        if len(schema) > limits.max_regex_chars:
            raise _beyond(name, len(schema), limits.max_regex_chars, " characters")
    elif schema is not None:
        if (size := len(json.dumps(schema))) > limits.max_schema_bytes:
            raise _beyond(name, size, limits.max_schema_bytes, " bytes")
        if (depth := _depth(schema)) > limits.max_schema_depth:
            raise _beyond(name, depth, limits.max_schema_depth, " levels")
        for pattern in _patterns(schema):
            if len(pattern) > limits.max_regex_chars:
                raise _beyond(f"{name} pattern", len(pattern), limits.max_regex_chars, " characters")


def _depth(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inside), default=0) if isinstance(value, dict | list) else 0


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions of a JSON schema."""
    if isinstance(schema, dict):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        yield from (key for key in schema.get("patternProperties") or () if isinstance(key, str))
    for one in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _patterns(one)
