"""What a run cost: device time and tokens by how trials ended, the judge's too, and money where prices are. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """One line of the bill. ``usd`` is None where no price is known."""

    what: str
    count: int
    device_seconds: float | None
    tokens: int
    usd: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bill(
    trials: Sequence[Mapping[str, Any]], judge: Mapping[str, Any] | None, usd_per_device_hour: float | None
) -> list[Cost]:
    """Trials by state, then the judge, then all together.

    Args:
        trials: as ``result.json`` has them.
        judge: as ``result.json`` has it; None where none was asked.
    """
    lines = []
    for state in ("COMPLETE", "PRUNED", "FAILED", "RUNNING"):
        own = [trial for trial in trials if trial["state"] == state]
        if own:
            seconds = sum(trial["device_seconds"] for trial in own)
            usd = None if usd_per_device_hour is None else seconds / 3600 * usd_per_device_hour
            lines.append(Cost(state, len(own), seconds, sum(trial["trained_tokens"] for trial in own), usd))
    if judge:
        tokens = judge["input_tokens"] + judge["output_tokens"]
        lines.append(Cost(f"judge {judge['model']}", judge["calls"], None, tokens, judge["spend_usd"] or None))
    known = [line.usd for line in lines if line.usd is not None]
    seconds = sum(line.device_seconds or 0.0 for line in lines)
    total = Cost("all", len(trials), seconds, sum(line.tokens for line in lines), sum(known) if known else None)
    return [*lines, total]
