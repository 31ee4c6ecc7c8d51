"""The model registry: immutable, content-addressed versions, the aliases that point to them, and who moved one when.

Everything that reads or writes ``registry/`` goes through here. A version's name is a hash of its weights, config and
tokenizer, so equal models share a version and a name never means two things.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import files, paths

PRODUCTION, PREVIOUS = "production", "previous"
_RECORD = "record.json"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version: where it lies and what is on record about it."""

    model: str
    version: str
    path: Path

    @property
    def record(self) -> dict[str, Any]:
        return files.read_json(self.path / _RECORD)


@contextmanager
def staging(model: str) -> Iterator[Path]:
    """An empty directory in which a version is put together; gone after the block unless registered."""
    root = paths.model_dir(model)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".staging-", ignore_cleanup_errors=True) as scratch:
        staged = Path(scratch) / "model"
        staged.mkdir()
        yield staged


def register(model: str, staged: Path, record: dict[str, Any]) -> ModelVersion:
    """Make the staged model a version. A version of the same content is returned as it is, with its first record."""
    version = f"v{content_hash(staged)[:12]}"
    target = paths.version_dir(model, version)
    if not target.exists():
        files.write_json(staged / _RECORD, record | {"model": model, "version": version, "registered_at": _now()})
        for file in staged.iterdir():
            file.chmod(0o444)
        staged.rename(target)
    return ModelVersion(model, version, target)


def content_hash(directory: Path) -> str:
    """SHA-256 over names and bytes of all files of a model, the record left out."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.name != _RECORD:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def find(reference: str) -> ModelVersion:
    """The version that ``MODEL``, ``MODEL@VERSION`` or ``MODEL@ALIAS`` names; alone, a model means its production.

    Raises:
        ValueError: no such model, version or alias.
    """
    model, _, wanted = reference.partition("@")
    if not paths.model_dir(model).is_dir():
        raise ValueError(f"no model {model!r} is registered; there are: {', '.join(models()) or 'none'}")
    version = aliases(model).get(wanted or PRODUCTION, wanted)
    if not version:
        raise ValueError(f"model {model!r} has no production version; name one: {', '.join(versions(model)) or 'none'}")
    path = paths.version_dir(model, version)
    if not (path / _RECORD).is_file():
        raise ValueError(
            f"model {model!r} has no version or alias {version!r}; there are: "
            f"{', '.join([*versions(model), *aliases(model)]) or 'none'}"
        )
    return ModelVersion(model, version, path)


def models() -> list[str]:
    return sorted(path.name for path in paths.registry().glob("*") if path.is_dir())


def versions(model: str) -> list[str]:
    """Oldest first."""
    found = [path.parent for path in paths.model_dir(model).glob(f"*/{_RECORD}")]
    return [
        path.name
        for path in sorted(found, key=lambda path: ModelVersion(model, path.name, path).record["registered_at"])
    ]


def aliases(model: str) -> dict[str, str]:
    """Version by alias."""
    file = paths.model_dir(model) / "aliases.json"
    return files.read_json(file) if file.exists() else {}


def set_alias(model: str, alias: str, version: str, reason: str) -> None:
    """Point ``alias`` to ``version`` and write down who did it and why; production's old version becomes previous."""
    now = aliases(model)
    before = now.get(alias)
    if alias == PRODUCTION and before and before != version:
        now[PREVIOUS] = before
    files.write_json(paths.model_dir(model) / "aliases.json", now | {alias: version})
    entry = {"at": _now(), "who": _user(), "alias": alias, "version": version, "before": before, "reason": reason}
    with (paths.model_dir(model) / "history.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
