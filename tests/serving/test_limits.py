"""What a request may ask for."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest

from serving import limits
from serving.errors import ApiError
from serving.spec import LimitsSpec

SPEC = LimitsSpec(max_prompt_chars=1000, max_tokens=100, max_n=2, max_schema_bytes=2000, max_regex_chars=50)
DEEP: Any = reduce(lambda inside, _: {"type": "array", "items": inside}, range(40), {"type": "string"})


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 101}, ["max_tokens must be at most 100", "got 101"]),
        ({"max_tokens": -100_000}, ["max_tokens must be at least 0", "got -100000"]),
        ({"n": -4}, ["n must be at least 0"]),
        ({"max_completion_tokens": 10**9}, ["max_completion_tokens"]),
        ({"n": 3}, ["n must be at most 2"]),
        ({"n": "3"}, ["n must be a whole number", 'got "3"']),
        ({"n": True}, ["n must be a whole number", "got true"]),
        ({"max_tokens": 1e9}, ["max_tokens must be a whole number", "got 1000000000.0"]),
        ({"max_tokens": "many" * 99}, ["max_tokens must be a whole number", "got [...]"]),
        ({"stream": 1}, ["stream must be true or false", "got 1"]),
        ({"stream": "true"}, ["stream must be true or false"]),
        ({"prompt": ["a", "b", "c"]}, ["at most 2 prompts"]),
        ({"prompt": "x" * 1001}, ["prompt must be at most 1000 characters"]),
        ({"prompt": [7] * 251}, ["prompt must be at most 1000"]),
        ({"prompt": [7] + [1.0] * 250}, ["prompt must be at most 1000"]),
        ({"tokens": [7] * 251}, ["tokens must be at most 1000"]),
        ({"documents": [{"text": "x" * 1001}]}, ["documents must be at most 1000"]),
        ({"chat_template_kwargs": {"a": "x" * 1001}}, ["chat_template_kwargs must be at most 1000"]),
        ({"prompt_logprobs": 0}, ["log-probabilities of a prompt"]),
        ({"echo": True, "logprobs": 1}, ["log-probabilities of a prompt"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 999}]}]}, ["messages"]),
        ({"stop": ["a"] * 9}, ["at most 8 strings"]),
        ({"stop": "x" * 300}, ["at most 256 characters"]),
        ({"chat_template": "{{ 1 }}"}, ["chat_template is not taken"]),
        ({"prompt_embeds": "AAAA"}, ["prompt_embeds"]),
        ({"ec_transfer_params": {}}, ["ec_transfer_params"]),
        ({"logits_processors": ["os.system"]}, ["logits_processors"]),
        (schema({"enum": ["x" * 100] * 30}), ["response_format must be at most 2000 bytes"]),
        (schema(DEEP), ["response_format must be at most 32 levels"]),
        (schema({"type": "string", "pattern": "a" * 51}), ["response_format pattern"]),
        (schema({"patternProperties": {"b" * 51: {}}}), ["response_format pattern"]),
        ({"structured_outputs": {"regex": "a" * 51}}, ["structured_outputs.regex must be at most 50"]),
        ({"structured_outputs": {"grammar": "g" * 3000}}, ["structured_outputs.grammar"]),
        ({"tools": [{"function": {"name": "f", "x": "y" * 3000}}]}, ["tools must be at most 2000 bytes"]),
        ({"tools": [{"function": {}}]}, ["tools must be a list of objects, each with the name"]),
        ({"tools": {}}, ["tools must be a list"]),
        ({"structured_outputs": "x"}, ["structured_outputs must be an object"]),
        ({"structured_outputs": {"json": "{"}}, ["structured_outputs.json must be JSON"]),
        ({"structured_outputs": {"json": "[" * 1900}}, ["structured_outputs.json must be JSON"]),
        ({"structured_outputs": {"json": "[" * 900 + "]" * 900}}, ["at most 32 levels"]),
        ({"structured_outputs": {"json": json.dumps({"pattern": "a" * 51})}}, ["structured_outputs.json pattern"]),
        ({"structured_outputs": {"json": json.dumps(DEEP)}}, ["structured_outputs.json must be at most 32 levels"]),
        ({"request_id": "a" * 65}, ["request_id must be a text of at most 64"]),
    ],
)
def test_what_goes_beyond_a_limit_is_refused_and_says_which(body: dict, words: list) -> None:
    with pytest.raises(ApiError) as caught:
        limits.check(body, SPEC)
    assert caught.value.status == 400
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.param
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"max_tokens": 100, "n": 2, "stop": ["a", "b"], "prompt": [1, 2, 3]},
        {"max_tokens": None, "n": None, "stop": {"a": 1}, "messages": 3, "stream": None},
        schema({"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}),
        {"chat_template": None, "structured_outputs": None, "response_format": "json", "tools": None},
        {"structured_outputs": {"json": json.dumps({"type": "string"})}, "request_id": "a" * 64},
    ],
)
def test_the_rest_is_left_to_vllm(body: dict) -> None:
    limits.check(body, SPEC)


def test_log_probabilities_of_a_prompt_may_be_allowed() -> None:
    asked = {"prompt_logprobs": 1, "echo": True, "logprobs": 1}
    limits.check(asked, SPEC.model_copy(update={"prompt_logprobs": True}))
    limits.check({"echo": True, "logprobs": None}, SPEC)
    limits.check({"logprobs": 5}, SPEC)


def test_what_a_client_that_leaves_is_charged() -> None:
    def of_chat(**more: Any) -> int:
        asked = {"messages": [{"role": "user", "content": "x" * 400}]} | more
        return limits.most_tokens(asked, limits.CHAT, SPEC) - 100 - len("user") // 4

    def of_completions(prompt: Any, **more: Any) -> int:
        return limits.most_tokens({"prompt": prompt} | more, limits.COMPLETIONS, SPEC)

    assert of_chat() == 100
    assert of_chat(max_tokens=7, n=2) == 14
    assert of_chat(max_completion_tokens=5, max_tokens=9) == 5
    assert of_chat(prompt="") == 100, "vLLM reads no prompt there"
    assert of_completions("x" * 8) == 16 + 2, "vLLM's default there"
    assert of_completions([1] * 8, max_completion_tokens=0, max_tokens=9) == 9 + 8, "nor that"
    assert of_completions(["x" * 8] * 3, max_tokens=9, n=2) == 54 + 6


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        json.dumps({"schema": reduce(lambda inside, _: [inside], range(150), 1)}).encode(),
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_told_so(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        limits.parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(caught.value.message) < 300
