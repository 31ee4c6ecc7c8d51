"""From a YAML file to a ``SweepDefinition``, or to one line that says what is wrong and where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster import paths
from sweeps.definition import SweepDefinition


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``5e-5`` as a number, as YAML 1.2 does, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key_node.value!r} twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: Path) -> SweepDefinition:
    """The definition in ``path``, every default filled in.

    Raises:
        ValueError: the file is missing, is not YAML, or breaks a rule; one line names the first rule broken, the
            value found, and where.
    """
    return parse(read(path), str(path))


def parse(content: Any, where: str) -> SweepDefinition:
    """A definition from plain data, as YAML or ``sweep.json`` give it."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be a mapping of sections, but got {type(content).__name__}")
    try:
        definition = SweepDefinition.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
    _check_revision(definition, where)
    return _with_absolute_base(definition)


def one_line(error: ValidationError) -> str:
    """The first of pydantic's errors: the place, the rule, the value."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; see 'python -m sweeps schema' for the keys there are"
    elif first["type"] == "missing":
        message = "required, but not there"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, but got {first['input']!r}"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def read(path: Path) -> Any:
    """A YAML file as plain data; ``ValueError`` where it is missing or broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a sweep definition in YAML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from None
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def is_hub_id(name: str) -> bool:
    """Whether a base is named by hub id rather than by a local directory."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not paths.expand(name).exists()


def check_inputs(definition: SweepDefinition) -> None:
    """The files and directories that a definition names are there.

    Raises:
        ValueError: one is not; the line says which and how to mend it.
    """
    name = definition.base_model.model_name_or_path
    if not is_hub_id(name) and not (paths.expand(name) / "config.json").is_file():
        raise ValueError(
            f"base_model.model_name_or_path: must be a directory with a config.json, or a hub id 'org/name', "
            f"but got {name!r}; the tiny base is made by scripts/make_tiny_base.py"
        )
    files = {f"data.sources.{index}.path": source.path for index, source in enumerate(definition.data.sources)}
    if definition.data.general:
        files["data.general"] = definition.data.general
    for place, file in files.items():
        if not paths.expand(file).is_file():
            raise ValueError(f"{place}: no such file: {file!r}; name a JSONL file of chat or alpaca rows")


def _with_absolute_base(definition: SweepDefinition) -> SweepDefinition:
    """A local base by its absolute path: workers have other working directories."""
    base = definition.base_model
    if is_hub_id(base.model_name_or_path):
        return definition
    absolute = base.model_copy(update={"model_name_or_path": str(paths.expand(base.model_name_or_path))})
    return definition.model_copy(update={"base_model": absolute})


def _check_revision(definition: SweepDefinition, where: str) -> None:
    base = definition.base_model
    if is_hub_id(base.model_name_or_path) and base.revision is None:
        raise ValueError(
            f"{where}: base_model.revision: required for the hub id {base.model_name_or_path!r}, so that the base "
            f"cannot change; name a commit or a tag, or a local directory in model_name_or_path"
        )
