"""``report.html``: a run for people, one self-contained page of tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from cluster import files, paths
from sweeps import contestants, costs, pages, results, reviews
from trainables.metrics import Scores

_COLUMNS = {"eval_loss", "trained_tokens"}
"""Objectives that the table of trials has anyway."""


def write_report(run_id: str) -> Path:
    """Make the page from the run's own files: ``result.json``, the study, the scored answers, what was said of them."""
    result, sweep = results.read(run_id), files.read_json(paths.sweep_file(run_id))
    scored = contestants.read(run_id) if contestants.are_there(run_id) else {}
    price = sweep["resources"].get("usd_per_device_hour")
    return pages.write(
        paths.report_file(run_id),
        "report",
        result=result,
        charts=_charts(run_id),
        answers=_differing_answers(scored),
        parameters=sorted({name for trial in result["trials"] for name in trial["params"]}),
        objectives=sorted({name for trial in result["trials"] for name in trial.get("objectives", {})} - _COLUMNS),
        metrics=sorted({name for scores in result["scores"].values() for name in scores}),
        confidence=sweep["evaluation"].get("confidence", 0.95),
        gains_chart=_gains_chart(result["gains"]) if result.get("gains") else "",
        judge=result.get("judge"),
        review=reviews.summary(run_id, scored),
        costs=[line.as_dict() for line in costs.bill(result["trials"], result.get("judge"), price)],
    )


def _gains_chart(gains: dict[str, dict[str, dict[str, float]]]) -> str:
    """Every gain in shares, with its interval; what lies right of zero is better than chance could make it."""
    figure = go.Figure()
    for other, found in gains.items():
        shares = {metric: gain for metric, gain in found.items() if not metric.endswith("judge_score")}
        ordered = sorted(shares.items(), reverse=True)
        figure.add_trace(
            go.Scatter(
                name=f"over {other}",
                x=[gain["gain"] for _, gain in ordered],
                y=[metric for metric, _ in ordered],
                mode="markers",
                orientation="h",
                offsetgroup=other,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [gain["high"] - gain["gain"] for _, gain in ordered],
                    "arrayminus": [gain["gain"] - gain["low"] for _, gain in ordered],
                },
            )
        )
    figure.add_vline(x=0, line_dash="dash", line_color="#b42318")
    rows = len({metric for found in gains.values() for metric in found})
    figure.update_layout(
        template="plotly_white",
        height=140 + 34 * rows,
        margin={"l": 10, "r": 20, "t": 30, "b": 40},
        xaxis_title="gain of the winner",
        yaxis={"automargin": True},
        scattermode="group",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return pages.chart(figure)


def _charts(run_id: str) -> list[str]:
    from sweeps.search import charts

    return charts.draw(run_id)


def _differing_answers(scored: dict[str, Scores], limit: int = 10) -> list[dict[str, Any]]:
    """Prompts on which base and winner differ, with both answers."""
    if not scored:
        return []
    pairs = zip(scored["base"].answers, scored["winner"].answers, strict=True)
    differing = [(base, winner) for base, winner in pairs if base.answer != winner.answer]
    return [
        {
            "prompt": base.prompt,
            "expected": base.expected,
            "base": pages.differences(base.answer, base.expected)[0],
            "winner": pages.differences(winner.answer, winner.expected)[0],
        }
        for base, winner in differing[:limit]
    ]
