"""Pages for people: one look for all, self-contained, from the templates beside this module."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from plotly.offline import get_plotlyjs

from cluster import files

_TEMPLATES = Path(__file__).parent / "templates"
Runs = list[tuple[str, bool]]


def write(path: Path, template: str, **values: Any) -> Path:
    """Fill the template of this name and write the page; its path again."""
    files.write_text(path, render(template, **values))
    return path


def render(template: str, **values: Any) -> str:
    """The template of this name, filled; every value is escaped unless the template says otherwise."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(["jinja", "html"]))
    environment.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    environment.filters["details"] = _details
    return environment.get_template(f"{template}.html.jinja").render(plotly=get_plotlyjs, **values)


def chart(figure: Any) -> str:
    """A plotly figure as a piece of a page; ``page.html.jinja`` brings plotly's code once for all of them.

    Without plotly's buttons: on a phone they would lie on the title.
    """
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})


def differences(left: str, right: str) -> tuple[Runs, Runs]:
    """Both texts in runs of words, each with whether the other text has it too."""
    one, other = _words(left), _words(right)
    matched = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    return (
        [("".join(one[start:end]), tag == "equal") for tag, start, end, _, _ in matched if end > start],
        [("".join(other[start:end]), tag == "equal") for tag, _, _, start, end in matched if end > start],
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _details(step: dict[str, Any]) -> str:
    """What a step of the manifest says beside its name and its counts."""
    others = {
        name: value for name, value in step.items() if name not in ("step", "in", "out") and value not in ({}, [])
    }
    return "; ".join(f"{name} {_plain(value)}" for name, value in others.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " | ".join(_plain(one) for one in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
