"""The import rules of the house, read from the source: who may import whom, and where heavy libraries may stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"cluster", "trainables", "serving", "sweeps"}
MAY_IMPORT = {
    "cluster": set(),
    "trainables": {"cluster"},
    "serving": {"cluster"},
    "sweeps": {"cluster", "trainables", "serving.registry", "serving.spec"},
}
TRAINING = {"torch", "transformers", "peft", "trl", "bitsandbytes"}
SERVING = ("replica", "engine", "meters", "upstream", "ingress", "front", "app", "place", "warming", "rollout")
SERVE_MODULES = {f"serving.{name}" for name in SERVING}
ALLOWED_HEAVY = {
    "cluster": {"ray": {"cluster.session", "cluster.forks"}},
    "trainables": {"ray": {"trainables.remote", "trainables.host"}, "vllm": {"trainables.generation"}},
    "serving": {"ray": SERVE_MODULES, "vllm": {"serving.engine", "serving.replica", "serving.ahead"}},
    "sweeps": {"ray.tune": {"sweeps.search"}, "optuna": {"sweeps.search"}},
}


def modules() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import anywhere in the file, with what is taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stands_under(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def forbidden(path: Path) -> list[str]:
    package, module = path.relative_to(ROOT).parts[0], name_of(path)
    found = []
    for name in imports(path):
        top = name.split(".")[0]
        if top in OURS - {package} and not stands_under(name, MAY_IMPORT[package]):
            found.append(f"{module} imports {name}")
        trains = package == "trainables" and not stands_under(module, {"trainables.data"})
        if top in TRAINING and not trains and module != "sweeps.search.trainable":
            found.append(f"{module} imports {name}")
        for heavy in ("ray.tune", "optuna", "vllm", "ray"):
            if stands_under(name, {heavy}):
                homes = ALLOWED_HEAVY[package].get(heavy) or ALLOWED_HEAVY[package].get("ray", set())
                if heavy == "ray" and package == "sweeps":
                    homes = {"sweeps.search", "sweeps.run", "sweeps.jobs"}
                if not stands_under(module, homes):
                    found.append(f"{module} imports {name}")
                break
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert forbidden(path) == []


def test_the_rule_sees_an_arrow_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "trainables").mkdir()
    wrong = tmp_path / "trainables" / "wrong.py"
    wrong.write_text("from serving import registry\nimport optuna\nimport torch\n")
    assert forbidden(wrong) == ["trainables.wrong imports serving.registry", "trainables.wrong imports optuna"]


def test_validate_loads_no_heavy_library(home: Path) -> None:
    code = (
        "import sys; from sweeps.__main__ import main; main(['validate', 'sweeps/definitions/smoke.yaml']);"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'ray', 'transformers', 'optuna', 'datasets', 'numpy', 'pyarrow', 'psutil'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "valid" in done.stderr


def test_personal_data_is_found_without_what_language_models_need() -> None:
    code = (
        "import sys, cluster.personal; print(sorted({'torch', 'transformers'} & set(sys.modules)));"
        "import torch, transformers; print(torch.__name__, transformers.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "torch transformers"], "not loaded, and there for whoever asks"


def test_an_application_is_described_without_loading_an_engine() -> None:
    code = (
        "import sys, serving.app; from pathlib import Path; from serving import engine, registry, spec;"
        "version = registry.ModelVersion('model', 'v1', Path('nowhere'));"
        "engine.deployment(version, spec.ServingSpec(), surge=True, begins=True);"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]


def test_nothing_imports_in_a_circle() -> None:
    graph = {name_of(path): {name for name in map(_module, imports(path)) if name} for path in modules()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            nxt == goal or (nxt not in seen and not seen.add(nxt) and reaches(nxt, goal, seen))
            for nxt in graph.get(start, ())
        )

    assert [name for name in graph if reaches(name, name, set())] == []


def _module(name: str) -> str | None:
    """The module of ours that an import names: itself, or what it is taken from."""
    known = {name_of(path) for path in modules()}
    parent = name.rpartition(".")[0]
    return name if name in known else parent if parent in known and parent not in OURS else None
