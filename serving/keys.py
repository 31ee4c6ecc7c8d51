"""API keys: named, hashed at rest, each with limits of its own. The plain key is shown once, when it is made."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from cluster import files, paths

_PREFIX = "wn-"


@dataclass(frozen=True)
class ApiKey:
    """A key as it is stored. None limits nothing.

    Args:
        sha256: of the key. A key has 256 random bits, so a hash without salt and stretching gives nothing away.
    """

    name: str
    sha256: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: str


def add(name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> str:
    """A new key, which is stored nowhere.

    Raises:
        ValueError: the name is taken or is none, or a limit is not positive.
    """
    paths.check_name("a key's name", name)
    for option, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
        if limit is not None and limit < 1:
            raise ValueError(f"--{option}-per-minute must be at least 1, but got {limit}; leave it out for no limit")
    with files.locked(paths.api_keys_writing_file()):
        known = read()
        if name in {key.name for key in known}:
            raise ValueError(f"there is a key {name!r} already; remove it first, or take another name")
        plain = _PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _write([*known, ApiKey(name, _hash(plain), requests_per_minute, tokens_per_minute, now)])
    return plain


def remove(name: str) -> None:
    """
    Raises:
        ValueError: there is no such key.
    """
    with files.locked(paths.api_keys_writing_file()):
        known = read()
        left = [key for key in known if key.name != name]
        if len(left) == len(known):
            raise ValueError(f"there is no key {name!r}; there are: {', '.join(key.name for key in known) or 'none'}")
        _write(left)


def read() -> list[ApiKey]:
    file = paths.api_keys_file()
    return [ApiKey(**entry) for entry in files.read_json(file)] if file.exists() else []


def match(keys: Iterable[ApiKey], plain: str) -> ApiKey | None:
    """The key that this is. Every one is compared, each in constant time, so the time taken tells nothing."""
    presented, found = _hash(plain), None
    for key in keys:
        if hmac.compare_digest(key.sha256, presented):
            found = key
    return found


def _write(keys: Iterable[ApiKey]) -> None:
    entries: list[dict[str, Any]] = [asdict(key) for key in keys]
    files.write_json(paths.api_keys_file(), entries, mode=0o600)


def _hash(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()
