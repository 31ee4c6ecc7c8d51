"""API keys at rest and their limits."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import paths
from serving import keys
from serving.__main__ import main
from serving.quota import Quota


def test_a_key_is_shown_once_and_only_its_hash_is_kept(home: Path, capsys) -> None:
    assert main(["keys", "add", "ada", "--requests-per-minute", "5", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["key"]
    file = paths.api_keys_file()
    assert plain not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = keys.match(keys.read(), plain)
    assert found is not None
    assert (found.name, found.requests_per_minute) == ("ada", 5)
    assert keys.match(keys.read(), plain + "x") is None
    assert keys.match(keys.read(), "") is None
    assert main(["keys", "remove", "ada"]) == 0
    assert keys.match(keys.read(), plain) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "ada"], ["a key 'ada' already"]),
        (["add", "../ada"], ["a key's name", "'../ada'"]),
        (["add", "eve", "--tokens-per-minute", "0"], ["--tokens-per-minute", "at least 1", "0"]),
        (["remove", "eve"], ["no key 'eve'", "ada"]),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(home: Path, arguments: list, words: list, capsys) -> None:
    keys.add("ada", None, None)
    before = keys.read()
    assert main(["keys", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert keys.read() == before


def test_keys_that_are_made_at_once_are_all_kept(home: Path) -> None:
    names = [f"key-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda name: keys.add(name, None, None), names))
    assert sorted(key.name for key in keys.read()) == sorted(names)
    assert all(keys.match(keys.read(), plain) for plain in made)


def test_requests_run_out_and_come_back_by_the_minute() -> None:
    quota = Quota.of(60, None, now=0.0)
    assert [quota.admit(0.0) for _ in range(60)] == [0.0] * 60
    assert quota.admit(0.0) == pytest.approx(1.0)
    assert quota.admit(0.5) == pytest.approx(0.5), "a refusal costs nothing"
    assert quota.admit(1.0) == 0.0
    assert quota.admit(1.0) > 0
    assert quota.spent_since() == (61, 0)


def test_tokens_are_paid_for_when_the_answer_is_over() -> None:
    quota = Quota.of(None, 600, now=0.0)
    assert quota.admit(0.0) == 0.0
    quota.spend(1200)
    assert quota.admit(0.0) == pytest.approx(60.1)
    assert quota.admit(30.0) > 0
    assert quota.admit(60.2) == 0.0
    assert quota.spent_since() == (2, 1200)


def test_what_other_replicas_spent_counts_here() -> None:
    quota = Quota.of(10, None, now=0.0)
    quota.take(10, 0)
    assert quota.admit(0.0) > 0
    assert quota.spent_since() == (0, 0)


def test_no_limit_is_no_limit() -> None:
    quota = Quota.of(None, None, now=0.0)
    quota.spend(10**9)
    assert {quota.admit(0.0) for _ in range(1000)} == {0.0}
