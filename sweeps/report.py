"""``report.html``: a run for people, one self-contained page of tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from cluster import files, paths
from sweeps import pages, results


def write_report(run_id: str) -> Path:
    """Make the page from the run's own files: ``result.json``, the study, the scored answers."""
    result = results.read(run_id)
    return pages.write(
        paths.report_file(run_id),
        "report",
        result=result,
        charts=_charts(run_id),
        answers=_differing_answers(run_id),
        parameters=sorted({name for trial in result["trials"] for name in trial["params"]}),
        metrics=sorted({name for scores in result["scores"].values() for name in scores}),
        confidence=files.read_json(paths.sweep_file(run_id))["evaluation"].get("confidence", 0.95),
        gains_chart=_gains_chart(result["gains"]) if result.get("gains") else "",
    )


def _gains_chart(gains: dict[str, dict[str, dict[str, float]]]) -> str:
    """Every gain with its interval; what lies right of zero is better than chance could make it."""
    figure = go.Figure()
    for other, found in gains.items():
        ordered = sorted(found.items(), reverse=True)
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


def _differing_answers(run_id: str, limit: int = 10) -> list[dict[str, Any]]:
    """Prompts on which base and winner differ, with both answers."""
    both = [paths.scores_file(run_id, name) for name in ("base", "winner")]
    if not all(file.exists() for file in both):
        return []
    base, winner = (files.read_json(file)["answers"] for file in both)
    differing = [pair for pair in zip(base, winner, strict=True) if pair[0]["answer"] != pair[1]["answer"]]
    return [
        {
            "prompt": left["prompt"],
            "expected": left["expected"],
            "base": pages.differences(left["answer"], left["expected"])[0],
            "winner": pages.differences(right["answer"], right["expected"])[0],
        }
        for left, right in differing[:limit]
    ]
