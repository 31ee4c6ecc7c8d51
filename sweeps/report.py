"""``report.html``: a run for people, one self-contained page of tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    )


def _charts(run_id: str) -> list[str]:
    from sweeps.search import charts

    return charts.draw(run_id)


def _differing_answers(run_id: str, limit: int = 10) -> list[dict[str, Any]]:
    """Prompts on which base and winner differ, with both answers."""
    both = [paths.scores_file(run_id, name) for name in ("base", "winner")]
    if not all(file.exists() for file in both):
        return []
    base, winner = (files.read_json(file)["answers"] for file in both)
    pairs = [left | {"winner": right["answer"]} for left, right in zip(base, winner, strict=True)]
    return [pair for pair in pairs if pair["answer"] != pair["winner"]][:limit]
