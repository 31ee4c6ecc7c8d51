"""A small world for all tests: a barely trained tiny base and a few tickets, made once by the project's own scripts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trainables.data.snapshot import Snapshot
    from trainables.spec import BaseModelSpec

ROOT = Path(__file__).parent.parent
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("RAY_ADDRESS", None)


def script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], check=True, capture_output=True, text=True)


async def until(true: Callable[[], Any], within_s: float = 10) -> None:
    """
    Raises:
        TimeoutError: it does not come true.
    """
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WINNOW_HOME with ``bases/tiny`` and ``sources/tickets``. Read only: tests work in a copy, ``home``."""
    root = tmp_path_factory.mktemp("world")
    script("make_tiny_base.py", "--out", str(root / "bases" / "tiny"), "--steps", "30")
    script("make_ticket_data.py", "--out", str(root / "sources" / "tickets"), "--rows", "120")
    return root


def home_of(world: Path, root: Path) -> Path:
    """A WINNOW_HOME at ``root`` with the world's base and data in it."""
    root.mkdir()
    for name in ("bases", "sources"):
        (root / name).symlink_to(world / name)
    return root


@pytest.fixture
def home(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A WINNOW_HOME of the test's own."""
    root = home_of(world, tmp_path / "home")
    monkeypatch.setenv("WINNOW_HOME", str(root))
    return root


@pytest.fixture(scope="session")
def tiny(world: Path) -> BaseModelSpec:
    """The world's base."""
    from trainables.spec import BaseModelSpec

    return BaseModelSpec(model_name_or_path=str(world / "bases" / "tiny"))


def another_base(tiny: BaseModelSpec, target: Path, **config: Any) -> BaseModelSpec:
    """The tiny base's weights under another config, at ``target``."""
    shutil.copytree(tiny.model_name_or_path, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tiny.model_copy(update={"model_name_or_path": str(target)})


def prepared(world: Path, home: Path, *more: str, **data: Any) -> Snapshot:
    """A snapshot under ``home`` of the world's tickets and ``more`` of its files, which train alone. Read only."""
    from trainables import base
    from trainables.data import prepare
    from trainables.spec import BaseModelSpec, DataSpec, SourceSpec

    files = world / "sources" / "tickets"
    sources = [SourceSpec(path=str(files / "tickets.jsonl"))]
    sources += [SourceSpec(path=str(files / name), splits="train") for name in more]
    tokenizer = base.load_tokenizer(BaseModelSpec(model_name_or_path=str(world / "bases" / "tiny")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(home))
        return prepare.prepare(DataSpec(sources=tuple(sources), max_length=128, min_examples=50, **data), tokenizer)


@pytest.fixture(scope="session")
def tickets(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The world's tickets in tokens, for tests of training."""
    return prepared(world, tmp_path_factory.mktemp("tickets"))


@pytest.fixture(scope="session")
def definition() -> Callable[..., dict[str, Any]]:
    """The smoke definition as plain data, with sections overridden: ``definition(search={"num_samples": 1})``."""
    from cluster import settings

    def make(**sections: Any) -> dict[str, Any]:
        content = settings.read_yaml(ROOT / "sweeps/definitions/smoke.yaml")
        content["data"]["min_examples"] = 50  # the tests' world is smaller than any user's
        for name, value in sections.items():
            content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
        return content

    return make


@pytest.fixture
def all_formats(home: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Sources of a definition: tickets as chat, a plain text of several rows, and prompts with a task."""
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "the quick fox jumps over the lazy dog " * 40}))
    sums = [{"prompt": f"{n} + {n}", "completion": str(2 * n), "task": "sum"} for n in range(1, 21)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    tickets = {"path": str(home / "sources" / "tickets" / "tickets.jsonl")}
    others = [{"path": str(tmp_path / name), "splits": "train_eval"} for name in ("book.jsonl", "sums.jsonl")]
    return [tickets, *others]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a definition (JSON is YAML) and returns its path."""

    def to_file(content: dict[str, Any]) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(content))
        return path

    return to_file


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The quickstart with ``--keep``: its home, its words, its endpoint until a test of ``test_rollout`` stops it."""
    from ray._common.network_utils import find_free_port

    home, port = tmp_path_factory.mktemp("quickstart"), find_free_port()
    environment = os.environ | {
        "WINNOW_HOME": str(home),
        "WINNOW_PORT": str(port),
        "WINNOW_VENV": str(Path(sys.executable).parent.parent),
    }
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--keep"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    (home / "quickstart.log").write_text(done.stderr + done.stdout)
    yield {"home": home, "done": done, "url": f"http://127.0.0.1:{port}/v1", "env": environment}
    winnow("serving", "stop", env=environment)


def winnow(package: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """One command as a user gives it: ``winnow("sweeps", "validate", path)``."""
    command = [sys.executable, "-m", package, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **options)
