"""Which version answers a request: a pure function of the aliases, of what is warm, and of who asks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from serving.registry import CANARY, PREVIOUS, PRODUCTION, SERVED

DIRECT = "direct"
"""The variant of a request that named its version itself."""


class NoSuchVersion(Exception):
    """A request names a version or an alias of which no replica is deployed."""


@dataclass(frozen=True)
class Routes:
    """One model's traffic at one moment.

    Args:
        warm: versions that are deployed; no other one is ever chosen.
        default: of them, the one that answers where no alias points to a warm one.
        weight: percent of requests for the canary, 0 to 100.
    """

    warm: Collection[str]
    default: str
    aliases: Mapping[str, str]
    weight: float = 0.0

    @property
    def production(self) -> str:
        """What is served, and not what a sweep has made production since: nobody has deployed that yet."""
        wanted = (self.aliases.get(alias) for alias in (SERVED, PRODUCTION, PREVIOUS))
        return next((version for version in wanted if version and version in self.warm), self.default)

    @property
    def canary(self) -> str | None:
        version = self.aliases.get(CANARY)
        return version if version in self.warm and version != self.production else None

    def choose(self, wanted: str, key: str) -> tuple[str, str]:
        """The version for one request, and the variant as which it answers.

        Args:
            wanted: what stands behind ``MODEL@``, a version or an alias; empty follows the traffic.
            key: whoever asks. The same key goes to the same variant as long as the canary is the same; while its
                weight grows keys move to the canary and never back.

        Raises:
            NoSuchVersion: ``wanted`` is not deployed.
        """
        if wanted:
            version = self.production if wanted == PRODUCTION else self.aliases.get(wanted, wanted)
            if version not in self.warm:
                raise NoSuchVersion(wanted)
            return version, DIRECT
        if self.canary and share(f"{self.canary}/{key}") * 100 < self.weight:
            return self.canary, CANARY
        return self.production, PRODUCTION


def share(key: str) -> float:
    """Where a key lies in [0, 1): evenly spread, and the same in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
