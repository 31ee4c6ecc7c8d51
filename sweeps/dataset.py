"""A definition's data, made ready for a run and shown to people: the snapshot, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from cluster import paths
from cluster.command import say
from sweeps import pages
from sweeps.definition import SweepDefinition, is_gate_metric
from trainables import answers, base, metrics
from trainables.data import prepare, suites
from trainables.data.snapshot import Snapshot, answered, summary_line
from trainables.spec import BaseModelSpec

_PAIRS_SHOWN = 20
_ENOUGH = 100
"""Answers that show which metrics there are."""


def prepared(definition: SweepDefinition, log: prepare.Log = say) -> Snapshot:
    """The snapshot, made now or found from before; its page stands beside it, also where the data is refused.

    Raises:
        ValueError: as ``examined``, or the data has errors, or nothing that the gate could compare.
    """
    manifest, made = examined(definition, log)
    try:
        data = prepare.accepted(manifest, made, log)
    except ValueError as error:
        raise ValueError(f"{error}; all of it: {paths.data_page(manifest['dataset_hash'])}") from None
    _check_gate(definition, data)
    log(summary_line(data))
    return data


def _check_tokens(spec: BaseModelSpec, padding: int | None, data: Snapshot) -> None:
    """The base has an embedding for each: on a GPU one that it has not ends an engine's process, with all trials."""
    known = base.vocabulary(spec)
    highest = max(data.highest_token(), -1 if padding is None else padding)
    if highest >= known:
        raise ValueError(
            f"base_model: must have embeddings for every token that its tokenizer makes of the data, but has {known} "
            f"and {'pads with' if highest == padding else 'the data has'} token {highest}; take the tokenizer that it "
            "was trained with, or resize its embeddings"
        )


def _check_gate(definition: SweepDefinition, data: Snapshot) -> None:
    """The metrics that the gate asks for are such as these answers have."""
    spec, fields = definition.gate, definition.evaluation.json_fields
    expected = [row["messages"][-1]["content"] for row in answered(data.rows("test"))]
    if not expected:
        raise ValueError(
            f"gate.metric: {spec.metric} compares answers, but no example of the test split has one; "
            "add a source with answers, or let one that has them go into all splits"
        )
    _check_metric("gate.metric", spec.metric, expected, "the test split's", fields)
    for name in filter(is_gate_metric, definition.search.objectives):
        _check_metric("search.objectives", name, expected, "the test split's", fields)
    for suite in suites.read(definition.evaluation, definition.data.task_prefixes):
        if suite.name in spec.suites:
            expected = [messages[-1]["content"] for messages in suite.conversations]
            _check_metric(
                f"gate.suites.{suite.name}.metric", spec.suites[suite.name].metric, expected, "the suite's", fields
            )


def _check_metric(place: str, metric: str, expected: list[str], whose: str, fields: Sequence[str] | None) -> None:
    kind = answers.kind_of(expected)
    perfect = [metrics.Answer("", text, text) for text in expected[:_ENOUGH]]
    there = metrics.measure(kind, perfect, fields)
    if metric not in there:
        able = ", ".join(filter(is_gate_metric, there))
        raise ValueError(f"{place}: must be one of {able}, as {whose} answers are {kind}, but got {metric!r}")


def examined(definition: SweepDefinition, log: prepare.Log = say) -> tuple[dict[str, Any], Snapshot | None]:
    """The manifest, and the snapshot where no finding is an error; the page is written either way.

    Raises:
        ValueError: the data cannot be read, or has tokens that the base does not know.
    """
    tokenizer = base.load_tokenizer(definition.base_model)
    asked = suites.read(definition.evaluation, definition.data.task_prefixes)
    completion_only = definition.training.completion_only_loss
    manifest, made = prepare.examine(definition.data, tokenizer, completion_only, log, asked)
    write_page(definition.name, manifest)
    if made is not None:
        _check_tokens(definition.base_model, tokenizer.pad_token_id, made)
    return manifest, made


def write_page(name: str, manifest: dict[str, Any]) -> Path:
    """The manifest for people, one self-contained page."""
    pairs = manifest["duplicates"]["pairs"][:_PAIRS_SHOWN]
    return pages.write(
        paths.data_page(manifest["dataset_hash"]),
        "data",
        name=name,
        data=manifest,
        errors=sum(finding["level"] == "error" for finding in manifest["findings"]),
        pairs=[pair | _sides(pair) for pair in pairs],
        chart=_lengths(manifest["lengths"], manifest["settings"]["max_length"]) if "lengths" in manifest else "",
    )


def _sides(pair: dict[str, Any]) -> dict[str, pages.Runs]:
    left, right = pages.differences(pair["removed_text"], pair["kept_text"])
    return {"left": left, "right": right}


def _lengths(lengths: dict[str, list[float]], limit: int) -> str:
    """Examples by tokens, before they were cut, and where they are cut."""
    edges, counts = lengths["edges"], lengths["counts"]
    figure = go.Figure(
        go.Bar(
            x=[(low + high) / 2 for low, high in pairwise(edges)],
            y=counts,
            width=[high - low for low, high in pairwise(edges)],
            marker_color="#3b6ea5",
            hovertemplate="%{x:.0f} tokens: %{y} examples<extra></extra>",
        )
    )
    figure.add_vline(x=limit, line_dash="dash", line_color="#b42318", annotation_text=f"max_length {limit:,}")
    figure.update_layout(
        template="plotly_white",
        height=320,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis_title="tokens",
        yaxis_title="examples",
    )
    return pages.chart(figure)
