"""Every definition that ships loads, and the schema that editors use is the one that the code has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeps import loading
from sweeps.definition import SweepDefinition

SHIPPED = sorted(Path("sweeps/definitions").glob("[!.]*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_loads_and_names_its_schema(path: Path) -> None:
    assert loading.load(path).search.num_samples > 0
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_there_are_the_three() -> None:
    assert {path.stem for path in SHIPPED} == {"quickstart", "smoke", "llama-3.1-8b"}


def test_the_schema_file_is_current() -> None:
    """Mend with: python -m sweeps schema > sweeps/definitions/schema.json"""
    assert json.loads(Path("sweeps/definitions/schema.json").read_text()) == SweepDefinition.model_json_schema()
