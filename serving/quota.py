"""How much a key may still ask for: one token bucket a limit, filled by the second, values and times given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Bucket:
    """Holds a minute's allowance. It may be overdrawn once: what an answer costs is known when it is over."""

    per_minute: float
    level: float
    at: float

    @classmethod
    def full(cls, per_minute: float, now: float) -> Bucket:
        return cls(per_minute, per_minute, now)

    def wait_s(self, now: float, least: float) -> float:
        """Seconds until ``least`` may be taken; 0 where it may be now."""
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        return max(0.0, least - self.level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass
class Quota:
    """One key's limits, as one ingress replica keeps them; what is spent at the others it is told."""

    requests: Bucket | None
    tokens: Bucket | None
    _spent: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, requests_per_minute: float | None, tokens_per_minute: float | None, now: float) -> Quota:
        requests, tokens = (
            Bucket.full(limit, now) if limit else None for limit in (requests_per_minute, tokens_per_minute)
        )
        return cls(requests, tokens)

    def admit(self, now: float) -> float:
        """Take one request. Where there is no room: seconds until there is, and nothing is taken."""
        waits = [bucket.wait_s(now, 1) for bucket in (self.requests, self.tokens) if bucket]
        if wait := max(waits, default=0.0):
            return wait
        self._spend(1, 0)
        return 0.0

    def spend(self, tokens: int) -> None:
        self._spend(0, tokens)

    def take(self, requests: int, tokens: int) -> None:
        """What was spent elsewhere."""
        if self.requests:
            self.requests.take(requests)
        if self.tokens:
            self.tokens.take(tokens)

    def spent_since(self) -> tuple[int, int]:
        """Requests and tokens spent here since this was last asked."""
        spent, self._spent = self._spent, (0, 0)
        return spent

    def _spend(self, requests: int, tokens: int) -> None:
        self.take(requests, tokens)
        self._spent = (self._spent[0] + requests, self._spent[1] + tokens)
