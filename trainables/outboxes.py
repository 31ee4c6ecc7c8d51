"""What an engine tells the trials that train in it: each trial has a queue, and reports go out one at a time.

The next report waits until the scheduler has judged the one before. So they are judged in the order in which an engine
tells them, whichever trial's process is the faster one, and a sampler that learns hears of them in that order.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from typing import Any

Message = tuple[str, Any, Any]
"""("report", Report, {path: bytes}), ("failed", reason, message), ("ended", None, None), or ("moved", place of the
engine that the trial goes to, None for any, {path: bytes} to go on from, None for its start)."""
Outbox = queue.Queue[Message]
END: Message = ("ended", None, None)


class Outboxes:
    """Open ones by trial. Not safe for threads: its owner's lock guards it."""

    def __init__(self) -> None:
        self._open: dict[str, Outbox] = {}
        self._held: deque[tuple[str, Outbox, Message]] = deque()
        self._undecided: str | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, trial_id: str) -> Outbox | None:
        return self._open.get(trial_id)

    @property
    def judged(self) -> set[str]:
        """Trials of which a report is being judged, or waits for that."""
        waiting = {trial_id for trial_id, _, message in self._held if message[0] == "report"}
        return waiting | ({self._undecided} if self._undecided else set())

    def open(self, trial_id: str) -> None:
        """A new one, whatever there was for the trial before."""
        self.close(trial_id)
        self._open[trial_id] = queue.Queue()

    def tell(self, trial_id: str, message: Message) -> None:
        """Hold a message until its turn comes; the last of a trial closes its outbox at once. Nobody is told twice."""
        outbox = self._open.get(trial_id) if message[0] == "report" else self._open.pop(trial_id, None)
        if outbox is not None:
            self._held.append((trial_id, outbox, message))
        self._hand_out()

    def decided(self, trial_id: str) -> None:
        """A trial's report has been judged."""
        if self._undecided == trial_id:
            self._undecided = None
        self._hand_out()

    def close(self, trial_id: str) -> None:
        """End a trial now: what it has not been told yet is of no use any more, but whoever waits for it must not."""
        outbox = self._open.pop(trial_id, None)
        for held in [one for one in self._held if one[0] == trial_id]:
            self._held.remove(held)
            outbox = held[1]
        if outbox is not None:
            outbox.put(END)
        self.decided(trial_id)

    def _hand_out(self) -> None:
        while self._held and self._undecided is None:
            trial_id, outbox, message = self._held.popleft()
            self._undecided = trial_id if message[0] == "report" else None
            outbox.put(message)
