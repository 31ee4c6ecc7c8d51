"""From a YAML file to a ``SweepDefinition``, or to one line that says what is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster import paths, settings
from sweeps.definition import SweepDefinition


def load(path: Path) -> SweepDefinition:
    """The definition in ``path``, every default filled in.

    Raises:
        ValueError: the file is missing, is not YAML, or breaks a rule; one line names the first rule broken, the
            value found, and where.
    """
    return parse(settings.read_yaml(path), str(path))


def parse(content: Any, where: str) -> SweepDefinition:
    """A definition from plain data, as YAML or ``sweep.json`` give it."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be a mapping of sections, but got {type(content).__name__}")
    try:
        definition = SweepDefinition.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ValueError(f"{where}: {settings.one_line(error)}") from None
    _check_revisions(definition, where)
    return _with_absolute_base(definition)


def check_inputs(definition: SweepDefinition) -> None:
    """The files and directories that a definition names are there.

    Raises:
        ValueError: one is not; the line says which and how to mend it.
    """
    name = definition.base_model.model_name_or_path
    if not paths.is_hub_id(name) and not (paths.expand(name) / "config.json").is_file():
        raise ValueError(
            f"base_model.model_name_or_path: must be a directory with a config.json, or a hub id 'org/name', "
            f"but got {name!r}; the tiny base is made by scripts/make_tiny_base.py"
        )
    for index, source in enumerate(definition.data.sources):
        if not paths.is_hub_id(source.path):
            _check_data(f"data.sources.{index}.path", source.path)
    if definition.data.general:
        _check_data("data.general", definition.data.general)
    for name, suite in definition.evaluation.asked.items():
        _check_data(f"evaluation.suites.{name}.path", suite.path)


def _check_data(place: str, name: str) -> None:
    if not paths.expand(name).exists():
        raise ValueError(f"{place}: no such file: {name!r}; name a JSONL or Parquet file or a directory of them")


def _with_absolute_base(definition: SweepDefinition) -> SweepDefinition:
    """A local base by its absolute path: workers have other working directories."""
    base = definition.base_model
    if paths.is_hub_id(base.model_name_or_path):
        return definition
    absolute = base.model_copy(update={"model_name_or_path": str(paths.expand(base.model_name_or_path))})
    return definition.model_copy(update={"base_model": absolute})


def _check_revisions(definition: SweepDefinition, where: str) -> None:
    base = definition.base_model
    named = {"base_model": (base.model_name_or_path, base.revision, "model_name_or_path")}
    named |= {
        f"data.sources.{index}": (source.path, source.revision, "path")
        for index, source in enumerate(definition.data.sources)
    }
    for place, (name, revision, field) in named.items():
        if paths.is_hub_id(name) and revision is None:
            raise ValueError(
                f"{where}: {place}.revision: required for the hub id {name!r}, so that what it names cannot change; "
                f"name a commit or a tag, or something on disk in {field}"
            )
