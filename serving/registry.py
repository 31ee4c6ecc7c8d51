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

PRODUCTION, SERVED, PREVIOUS, CANARY = "production", "served", "previous", "canary"
"""A sweep makes what it has accepted production; the traffic goes to what was deployed or promoted last, which is
served, and before that the previous one was."""
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
    """Point ``alias`` to ``version`` and write down who did it and why. No traffic moves; of a model that was never
    served, production's old version becomes previous."""
    with _writing(model):
        now = aliases(model)
        before = now.get(alias)
        if alias == PRODUCTION and SERVED not in now and before and before != version:
            now[PREVIOUS] = before
        _write_aliases(model, now | {alias: version})
        _note(model, alias, version, before, reason)


def set_served(model: str, version: str, was: str | None) -> bool:
    """Have the traffic go to ``version``, which has been deployed.

    Args:
        was: what was served when that was decided; nothing is done where it is another one by now.

    Returns:
        Whether the traffic goes to ``version``.
    """
    with _writing(model):
        now = aliases(model)
        before = now.get(SERVED)
        if before != was or before == version:
            return before == version
        previous = before or now.pop(PREVIOUS, None)
        kept = {PREVIOUS: previous} if previous and previous != version else {}
        _write_aliases(model, now | kept | {SERVED: version})
        _note(model, SERVED, version, before, "deploy")
        return True


def settle(model: str, version: str, reason: str) -> None:
    """Have production name what serves, where a sweep or a deployment has moved one of the two. Where nothing tells
    that it was served, what was before it is unknown."""
    with _writing(model):
        now = aliases(model)
        before = now.get(PRODUCTION)
        if now.get(SERVED, before) != version:
            now.pop(PREVIOUS, None)
        _write_aliases(model, now | {PRODUCTION: version, SERVED: version})
        if before != version:
            _note(model, PRODUCTION, version, before, reason)


def end_canary(model: str, reason: str) -> None:
    """If there is one."""
    with _writing(model):
        if CANARY in aliases(model):
            _drop_canary(model, reason)


def promote(model: str, version: str, reason: str, judged: dict[str, Any] | None = None) -> None:
    """Make ``version`` production, and have it served. A canary ends with it: it was held against what production was.

    Args:
        judged: of a canary: nothing is done where it is not the present one any more.
    """
    with _writing(model):
        if judged and canary(model) != judged:
            return
        _serve(model, version, reason)
        if CANARY in aliases(model):
            _drop_canary(model, reason)


def roll_back(model: str, reason: str, judged: dict[str, Any] | None = None) -> str:
    """End the canary, or where there is none, serve the previous version again, as production.

    Args:
        judged: as of ``promote``.

    Returns:
        The version that is served now.

    Raises:
        ValueError: there is neither a canary nor a previous version.
    """
    with _writing(model):
        now = aliases(model)
        if judged and canary(model) != judged:
            pass
        elif CANARY in now:
            _drop_canary(model, reason)
        elif PREVIOUS in now:
            _serve(model, now[PREVIOUS], reason)
        else:
            raise ValueError(f"model {model!r} has no canary and no previous version to go back to")
        now = aliases(model)
        return now.get(SERVED) or now[PRODUCTION]


def set_canary(
    model: str,
    version: str,
    weight: float,
    reason: str,
    step: int | None = None,
    judged: dict[str, Any] | None = None,
) -> None:
    """Send ``weight`` percent of the traffic to ``version``.

    Args:
        step: of its timetable, from 0; None for a canary that only people move.
        judged: as of ``promote``.

    Raises:
        ValueError: it is what serves: it was promoted meanwhile.
    """
    with _writing(model):
        if judged and canary(model) != judged:
            return
        if aliases(model).get(SERVED) == version:
            raise ValueError(f"{model}@{version} is production already; a canary is another version")
        plan = {"version": version, "weight": weight, "step": step, "since": _now()}
        files.write_json(_canary_file(model), plan)  # before the alias: a canary without a plan gets nothing
        now = aliases(model)
        _write_aliases(model, now | {CANARY: version})
        _note(model, CANARY, version, now.get(CANARY), reason, weight=weight)


def canary(model: str) -> dict[str, Any] | None:
    """The canary's ``version``, ``weight``, ``step`` and ``since``; None where there is none."""
    file, version = _canary_file(model), aliases(model).get(CANARY)
    try:
        plan = files.read_json(file)
    except FileNotFoundError:
        return None
    return plan if plan["version"] == version else None


def note(model: str, alias: str, version: str, reason: str) -> None:
    """A line of history for what was decided and moved no alias."""
    with _writing(model):
        _note(model, alias, version, version, reason)


def history(model: str) -> list[dict[str, Any]]:
    """Oldest first."""
    file = paths.model_dir(model) / "history.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@contextmanager
def _writing(model: str) -> Iterator[None]:
    """One writer at a time: commands and the conductor of a canary move the same aliases."""
    with files.locked(paths.model_dir(model) / ".lock"):
        yield


def _serve(model: str, version: str, reason: str) -> None:
    now = aliases(model)
    before = now.get(SERVED, now.get(PRODUCTION))
    if before and before != version:
        now[PREVIOUS] = before
    _write_aliases(model, now | {PRODUCTION: version, SERVED: version})
    _note(model, PRODUCTION, version, before, reason)


def _drop_canary(model: str, reason: str) -> None:
    now = aliases(model)
    before = now.pop(CANARY)
    _write_aliases(model, now)
    _canary_file(model).unlink(missing_ok=True)
    _note(model, CANARY, None, before, reason)


def _write_aliases(model: str, now: dict[str, str]) -> None:
    files.write_json(paths.model_dir(model) / "aliases.json", now)


def _canary_file(model: str) -> Path:
    return paths.model_dir(model) / "canary.json"


def _note(model: str, alias: str, version: str | None, before: str | None, reason: str, **more: Any) -> None:
    entry = {"at": _now(), "who": _user(), "alias": alias, "version": version, "before": before, "reason": reason}
    with (paths.model_dir(model) / "history.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry | more) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
