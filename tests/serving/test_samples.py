from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from serving.samples import Sampler, conversation
from serving.spec import SamplingSpec

LINE = "Ada Lovelace, ada@example.com, key sk-ant-api03-a1B2c3D4e5F6g7H8i9J0"


def as_it_is(text: str) -> str:
    return text


def kept(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in home.glob("samples/*/*.jsonl") for line in file.read_text().splitlines()]


def test_what_is_kept_has_no_personal_data_and_one_value_keeps_one_name(home: Path) -> None:
    async def take() -> None:
        sampler = Sampler("tickets", SamplingSpec(share=1))
        body = {"messages": [{"role": "user", "content": LINE, "name": "ada"}], "user": "ada@example.com"}
        sampler.take(body, ["write to ada@example.com or bob@example.com"], id="one", version="v1")
        await asyncio.gather(*sampler._writing)

    asyncio.run(take())
    [line] = kept(home)
    assert line["messages"] == [
        {"role": "user", "content": "Ada Lovelace, <EMAIL_ADDRESS_1>, key <API_KEY_1>"},
        {"role": "assistant", "content": "write to <EMAIL_ADDRESS_1> or <EMAIL_ADDRESS_2>"},
    ]
    assert (line["id"], line["version"]) == ("one", "v1")
    assert "ada" not in json.dumps(line)
    [file] = home.glob("samples/tickets/*.jsonl")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_samples_are_data_for_the_next_sweep() -> None:
    from trainables.data.formats import Example, read_rows

    row = {"at": "2026-11-26", "id": "one"} | conversation({"prompt": "lemon"}, ["peel"], as_it_is)
    [example] = read_rows([(1, row)], "samples.jsonl")
    assert isinstance(example, Example)
    assert [turn["content"] for turn in example.messages] == ["lemon", "peel"]


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"prompt": "lemon"}, "lemon"),
        ({"prompt": ["lemon", "peel"]}, "lemon\npeel"),
        ({"prompt": [1, 2]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}]}, "see"),
    ],
)
def test_texts_stay_and_nothing_else(body: dict[str, Any], asked: str) -> None:
    found = conversation(body, ["one", "two"], as_it_is)
    assert found["messages"] == [{"role": "user", "content": asked}, {"role": "assistant", "content": "one"}]
    assert found["other_answers"] == ["two"]


def test_only_a_share_is_kept_and_no_more_than_so_many_a_minute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("serving.samples.time.monotonic", lambda: now)
    few = Sampler("tickets", SamplingSpec(share=0.2, max_per_minute=1e9))
    limited = Sampler("tickets", SamplingSpec(share=1, max_per_minute=30))
    now = 60.0
    assert 120 < sum(few.wants() for _ in range(1000)) < 280
    assert sum(limited.wants() for _ in range(1000)) == 30
    now = 70.0
    assert sum(limited.wants() for _ in range(1000)) == 5
    seldom = Sampler("tickets", SamplingSpec(share=1, max_per_minute=0.5))
    now = 200.0
    assert sum(seldom.wants() for _ in range(1000)) == 1
