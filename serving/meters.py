"""What Prometheus sees, through Ray's own exporter: of an ingress replica by model, version and variant; of an engine
what vLLM counts. Queues and replicas it sees already: Serve exports them by deployment, which is a version here.
"""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import REGISTRY
from ray.serve import metrics
from ray.util.metrics import Counter, Histogram

from serving.counts import Counts

_WHO = ("model", "version", "variant")
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]


class Meters:
    """Ray puts ``ray_`` before these names. Requests are told of together, when none of them waits."""

    def __init__(self) -> None:
        self._outcomes, self._kinds = Tally[tuple[str, ...]](), Tally[tuple[str, ...]]()
        self._seconds: list[tuple[Histogram, float, tuple[str, ...]]] = []
        self._requests = Counter("winnow_requests", "Requests by outcome.", (*_WHO, "outcome"))
        self._tokens = Counter("winnow_tokens", "Tokens by kind.", (*_WHO, "kind"))
        self._latency = Histogram("winnow_request_seconds", "To the last byte of an answer.", _SECONDS, _WHO)
        self._first = Histogram("winnow_first_token_seconds", "To the first event of a stream.", _SECONDS, _WHO)
        self._each = Histogram("winnow_token_seconds", "From one token of a stream to the next.", _SECONDS, _WHO)

    def add(self, model: str, version: str, variant: str, counts: Counts, first_s: float | None, took_s: float) -> None:
        """One request, to be told of.

        Args:
            counts: of it alone.
            first_s: to the first event, None where it was not streamed.
            took_s: to the last one.
        """
        who = (model, version, variant)
        outcome = "error" if counts.errors else "rejected" if counts.rejected else "answered"
        self._outcomes[*who, outcome] += 1
        if outcome != "answered":
            return
        self._outcomes[*who, "invalid"] += counts.invalid
        self._kinds[*who, "prompt"] += counts.prompt_tokens
        self._kinds[*who, "completion"] += counts.completion_tokens
        self._seconds.append((self._latency, took_s, who))
        if first_s is not None:
            self._seconds.append((self._first, first_s, who))
            if counts.completion_tokens > 1:
                self._seconds.append((self._each, (took_s - first_s) / (counts.completion_tokens - 1), who))

    def tell(self) -> None:
        """Ray, of all requests since it was told last."""
        for counter, key, sums in ((self._requests, "outcome", self._outcomes), (self._tokens, "kind", self._kinds)):
            for tags, amount in sums.items():
                if amount:
                    counter.inc(amount, dict(zip((*_WHO, key), tags, strict=True)))
            sums.clear()
        for histogram, seconds, who in self._seconds:
            histogram.observe(seconds, dict(zip(_WHO, who, strict=True)))
        self._seconds.clear()


class EngineMeters:
    """vLLM's own figures, as it keeps them for Prometheus in this process. Serve says of which model and version."""

    def __init__(self) -> None:
        self._gauges: dict[str, metrics.Gauge] = {}

    def tell(self) -> None:
        """All of them as they stand. A histogram is its buckets, sum and count, which PromQL takes as they are."""
        for family in REGISTRY.collect():
            for sample in family.samples if family.name.startswith("vllm:") else ():
                if not sample.name.endswith("_created"):
                    self._gauge(sample.name, family.documentation, tuple(sample.labels)).set(
                        sample.value, sample.labels
                    )

    def _gauge(self, name: str, documentation: str, labels: tuple[str, ...]) -> metrics.Gauge:
        if name not in self._gauges:
            self._gauges[name] = metrics.Gauge(name.replace(":", "_"), documentation, tag_keys=labels)  # type: ignore[arg-type]  # of any length
        return self._gauges[name]
