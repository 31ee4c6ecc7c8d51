"""What the scheduler decided about trials, for the searcher to write down: Ray Tune itself does not pass it on.

Tune tells a searcher only that a trial ended. Whether ASHA stopped it, its loss was NaN or its process died is known
where the decision is made; both sides share this ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sweeps.search.study import State


@dataclass(frozen=True)
class Verdict:
    """How a trial ended. ``reason`` is one of the contract's for FAILED, otherwise None."""

    state: State
    reason: str | None = None
    message: str | None = None


@dataclass
class Ledger:
    """Verdicts by Tune's trial id. A trial without one ended by itself: COMPLETE."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def write(self, tune_id: str, verdict: Verdict) -> None:
        self.verdicts.setdefault(tune_id, verdict)

    def read(self, tune_id: str) -> Verdict:
        return self.verdicts.get(tune_id, Verdict("COMPLETE"))
