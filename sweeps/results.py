"""``result.json``: the outcome of a run, written here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cluster import files, paths
from sweeps.gate import Gate

Status = Literal["accepted", "rejected", "failed", "interrupted"]


@dataclass
class Outcome:
    """What is known of a run so far; filled stage by stage, written whole at each."""

    run_id: str
    name: str
    base_model: dict[str, Any]
    status: Status = "interrupted"
    wall_s: float = 0.0
    dataset_hash: str | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    best_trial_id: str | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    gains: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Of the winner over each other contestant, by metric, with the interval."""
    gate: Gate | None = None
    model: dict[str, str] | None = None
    judge: dict[str, Any] | None = None
    """What a judge did and chose; None where the definition has none."""
    review: dict[str, Any] | None = None
    """What people said; None where nobody reviewed."""
    error: str | None = None

    def as_result(self) -> dict[str, Any]:
        """The object of DESIGN.md, in its order; ``judge``, ``review`` and ``error`` only where there is one."""
        result: dict[str, Any] = {
            "run_id": self.run_id,
            "name": self.name,
            "status": self.status,
            "wall_s": round(self.wall_s, 1),
            "dataset_hash": self.dataset_hash,
            "base_model": self.base_model,
            "trials": self.trials,
            "best_trial_id": self.best_trial_id,
            "scores": self.scores,
            "gains": self.gains,
            "gate": self.gate.as_result() if self.gate else None,
            "model": self.model,
        }
        others = {"judge": self.judge, "review": self.review, "error": self.error}
        return result | {name: value for name, value in others.items() if value}

    def write(self) -> dict[str, Any]:
        result = self.as_result()
        files.write_json(paths.result_file(self.run_id), result)
        return result


def read(run_id: str) -> dict[str, Any]:
    """A run's outcome.

    Raises:
        ValueError: there is no such run, or it has none yet.
    """
    file = paths.result_file(run_id)
    paths.require_run(run_id)
    if not file.exists():
        raise ValueError(f"run {run_id!r} has no result yet; see 'python -m sweeps status {run_id}'")
    return files.read_json(file)
