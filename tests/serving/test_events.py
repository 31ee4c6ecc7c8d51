"""A stream is passed on byte by byte, and what it says is counted on the way."""

from __future__ import annotations

import json

import pytest

from serving.events import Stream, is_empty, is_json, texts


def event(**content: object) -> bytes:
    """Compact, as vLLM writes it."""
    return b"data: " + json.dumps({"id": "chatcmpl-1", **content}, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str, index: int = 0) -> bytes:
    return event(choices=[{"index": index, "delta": {"content": text}}])


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})
DONE = b"data: [DONE]\n\n"
WHOLE = delta('{"a": ') + delta("1}") + USAGE + DONE


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_however_it_is_cut_the_same_comes_out(size: int) -> None:
    stream = Stream(show_usage=False, keep=True)
    passed = b"".join(stream.feed(WHOLE[start : start + size]) for start in range(0, len(WHOLE), size))
    assert passed == WHOLE.replace(USAGE, b"")
    told = stream.told()
    assert (told.id, told.done, told.failed) == ("chatcmpl-1", True, "")
    assert told.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert told.texts == ['{"a": 1}']


def test_token_counts_are_passed_on_to_whoever_asked() -> None:
    assert Stream(show_usage=True, keep=False).feed(WHOLE) == WHOLE


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_other_servers_write_events_in_other_ways(size: int) -> None:
    """Spaces in the JSON, the line ends of HTTP, comments in between, token counts that are null or beside a choice."""
    first, last = {"index": 0, "delta": {"content": "a"}}, {"index": 0, "delta": {"content": "b"}}
    events = [
        ": ping",
        f"data: {json.dumps({'id': 'theirs', 'choices': [first], 'usage': None})}",
        ": ping",
        f"data:{json.dumps({'id': 'theirs', 'choices': [last], 'usage': {'completion_tokens': 2}})}",
        "data: not what was promised",
        "data: [DONE]",
    ]
    whole = b"".join(f"{one}\r\n\r\n".encode() for one in events)
    stream = Stream(show_usage=False, keep=True)
    passed = b"".join(stream.feed(whole[start : start + size]) for start in range(0, len(whole), size))
    assert passed == whole.replace(b"\r\n", b"\n")
    told = stream.told()
    assert (told.id, told.usage, told.done, told.failed) == ("theirs", {"completion_tokens": 2}, True, "")
    assert told.texts == ["ab"]


def test_an_error_in_the_stream_is_seen() -> None:
    stream = Stream(show_usage=False, keep=False)
    stream.feed(delta("a") + b'data: {"error": {"message": "no"}}\n\n' + DONE)
    assert (stream.told().failed, stream.told().status) == ("no", 500)
    stream.feed(b'data: {"error": {"message": "no", "code": 400}}\n\n')
    assert stream.told().status == 400
    assert not Stream(show_usage=False, keep=False).told().done


@pytest.mark.parametrize(("space", "ends"), [("", "length"), (" ", "stop")])
def test_how_an_answer_ended_is_seen_without_keeping_it(space: str, ends: str) -> None:
    stream = Stream(show_usage=False, keep=False)
    last = {"index": 0, "delta": {}, "finish_reason": ends, "stop_reason": "x" if ends == "stop" else None}
    body = json.dumps({"choices": [last]}, separators=(",", f":{space}"))
    stream.feed(event(choices=[{"index": 0, "delta": {"content": 'no "length"'}, "finish_reason": None}]))
    assert (stream.told().cut, stream.told().stopped) == (False, False)
    stream.feed(f"data: {body}\n\n".encode() + DONE)
    assert (stream.told().cut, stream.told().stopped) == (ends == "length", ends == "stop")


def test_texts_of_several_choices() -> None:
    stream = Stream(show_usage=False, keep=True)
    stream.feed(delta("b", 1) + delta("a", 0) + delta("c", 1))
    assert stream.told().texts == ["a", "bc"]
    assert texts({"choices": [{"message": {"content": "x"}}, {"text": "y"}, {"message": {"content": None}}]}) == [
        "x",
        "y",
        "",
    ]
    assert not is_empty({"choices": [{"message": {"content": None, "tool_calls": [{"id": "x"}]}}, {"text": "y"}]})
    assert is_empty({"choices": [{"text": "y"}, {"message": {"content": None}}]})
    assert is_json("[1]")
    assert not is_json('{"a": ')
