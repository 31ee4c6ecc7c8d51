"""Writing files that another process may be reading: whole, by a temporary name and a rename, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace ``path`` by ``text`` in one step; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """``write_text`` of indented JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", mode)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def held(path: Path, otherwise: str) -> Iterator[None]:
    """The lock ``path`` for the block. It goes with the process, however that ends.

    Raises:
        ValueError: another process has it; with the words ``otherwise``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(otherwise) from None
        yield


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """The same, and whoever else wants it waits; those who want it ``shared`` only for one who does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends without an error.

    Raises:
        FileExistsError: ``path`` exists; what stands there is never replaced.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        unfinished = Path(scratch) / path.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(path)
        except OSError as error:  # of a name that another process took meanwhile, it says that it is not empty
            if path.exists():
                raise FileExistsError(f"{path} exists already") from error
            raise


def read_tree(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` by its relative path."""
    found = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in found}


def write_tree(directory: Path, tree: dict[str, bytes]) -> None:
    """What ``read_tree`` read, into a directory of one's own."""
    for name, content in tree.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
