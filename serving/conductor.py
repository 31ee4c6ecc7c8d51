"""The one place where a model's counts come together, and the clockwork of its automatic canaries."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from serving import registry
from serving.counts import Counts
from serving.judgement import Decision, Judgement, judge
from serving.registry import CANARY, PRODUCTION
from serving.spec import CanarySpec, with_changes

NAME = "conductor"
_TICK_S = 1.0
_log = logging.getLogger("ray.serve")
_NUMBER = re.compile(r"[\d.]+")
_REMEMBERED = 20_000
"""Answers whose variant is known when feedback on them arrives."""
_MINUTE_S = 60.0
"""By which keys are limited."""

Who = tuple[str, str]
"""Version and variant."""
Spent = dict[str, tuple[int, int]]
"""By an API key's hash, requests and tokens."""


@dataclass
class Delta:
    """What an ingress replica counted since it last reported."""

    counts: dict[Who, Counts] = field(default_factory=dict)
    answers: dict[str, Who] = field(default_factory=dict)
    spent: Spent = field(default_factory=dict)

    def add(self, version: str, variant: str, identity: str | None, counts: Counts) -> None:
        self.counts.setdefault((version, variant), Counts()).merge(counts)
        if identity:
            self.answers[identity] = (version, variant)

    def merge(self, other: Delta) -> None:
        for who, counts in other.counts.items():
            self.counts.setdefault(who, Counts()).merge(counts)
        self.answers |= other.answers
        add_spent(self.spent, other.spent)


def add_spent(total: Spent, more: Spent) -> None:
    for sha256, (requests, tokens) in more.items():
        before = total.get(sha256, (0, 0))
        total[sha256] = (before[0] + requests, before[1] + tokens)


class Timetable:
    """An automatic canary on its way: what it does at a time, given what was counted. It has no clock of its own."""

    def __init__(self, model: str, spec: CanarySpec) -> None:
        self._model, self._spec = model, spec
        self._step: tuple[str, int, str] | None = None
        self._since = 0.0
        self._before: dict[str, Counts] = {}
        self._told = ""

    def tick(self, now: float, counts: dict[Who, Counts]) -> Judgement | None:
        """Judge the canary's step, and move it on or back. None where no automatic canary runs.

        Args:
            now: seconds, of any clock that never goes back.
        """
        plan = registry.canary(self._model)
        if plan is None or plan["step"] is None:
            self._step = None
            return None
        step = (plan["version"], plan["step"], plan["since"])
        if self._step != step:
            self._step, self._since, self._told = step, now, ""
            self._before = _by_variant(counts)
        since = {name: _since(self._before.get(name), total) for name, total in _by_variant(counts).items()}
        production, canary = since.get(PRODUCTION, Counts()), since.get(CANARY, Counts())
        found = judge(self._spec, production, canary, now - self._since)
        self._act(plan, found)
        return found

    def _act(self, plan: dict[str, Any], found: Judgement) -> None:
        reason, version = f"{found.decision}: {found.reason}", plan["version"]
        following = plan["step"] + 1
        if found.decision is not Decision.HOLD:
            self._step = None  # whatever comes next begins anew
        if found.decision is Decision.ROLL_BACK:
            registry.roll_back(self._model, reason, judged=plan)
        elif found.decision is Decision.HOLD:
            if (told := _NUMBER.sub("", found.reason)) != self._told:  # a reason is history once, not once a second
                registry.note(self._model, CANARY, version, reason)
                self._told = told
        elif following >= len(self._spec.weights):
            registry.promote(self._model, version, reason, judged=plan)
        else:
            registry.set_canary(self._model, version, self._spec.weights[following], reason, following, judged=plan)


class Ledger:
    """What keys spent, told to each replica of the ingress that it was not spent at. It has no clock of its own."""

    def __init__(self) -> None:
        self._lately: deque[tuple[float, Spent]] = deque()
        self._untold: dict[str, Spent] = {}
        self._heard: dict[str, float] = {}

    def exchange(self, ingress: str, spent: Spent, now: float) -> Spent:
        """Take what was spent at one replica, and give what was at the others since it last asked; where it is new, for
        it begins with all that its keys may spend in a minute, what was in the last one."""
        while self._lately and self._lately[0][0] < now - _MINUTE_S:
            self._lately.popleft()
        for name in [name for name, at in self._heard.items() if at < now - _MINUTE_S]:
            del self._heard[name], self._untold[name]
        told = self._untold.get(ingress)
        if told is None:
            told = {}
            for _, once in self._lately:
                add_spent(told, once)
        self._untold[ingress], self._heard[ingress] = {}, now
        if spent:
            self._lately.append((now, spent))
        for name, untold in self._untold.items():
            if name != ingress:
                add_spent(untold, spent)
        return told


def _by_variant(counts: dict[Who, Counts]) -> dict[str, Counts]:
    """Production's and the canary's counts as they are now, apart from the ones that go on growing."""
    found: dict[str, Counts] = {}
    for (_, variant), one in counts.items():
        found.setdefault(variant, Counts()).merge(one)
    return found


def _since(before: Counts | None, total: Counts) -> Counts:
    return total.less(before) if before else total


class Conductor:
    """One replica a model; ingress replicas report to it. Counts are kept from its start."""

    async def __init__(self, model: str, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._counts: dict[Who, Counts] = {}
        self._answers: OrderedDict[str, tuple[Who, bool]] = OrderedDict()
        self._ledger = Ledger()
        self._timetable = Timetable(model, with_changes(settings, {}).canary)
        self._since = time.time()
        self._clock = asyncio.create_task(self._run())

    async def _run(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._timetable.tick(time.monotonic(), self._counts)
            except Exception as error:  # storage that is away for a moment: all counts would go with this replica
                if str(error) != told:
                    _log.warning("no canary is judged: %s", error)
                told = str(error)

    async def report(self, ingress: str, delta: Delta) -> Spent:
        """Add what one replica of the ingress counted. Calls here are coroutines that wait for nothing, so one follows
        the other; Serve would run plain functions in threads.

        Returns:
            What the keys spent at the other replicas since this one last reported.
        """
        elsewhere = self._ledger.exchange(ingress, delta.spent, time.monotonic())
        for who, counts in delta.counts.items():
            self._counts.setdefault(who, Counts()).merge(counts)
        for identity, who in delta.answers.items():
            self._answers.setdefault(identity, (who, False))
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)
        return elsewhere

    async def feedback(self, identity: str, score: float) -> bool:
        """Count a score from 0 to 1 for whoever gave that answer, the first one alone: a later one would change what an
        earlier step was judged by. False where nobody is known to have given it."""
        if (known := self._answers.get(identity)) is None:
            return False
        who, scored = known
        if not scored:
            self._answers[identity] = (who, True)
            self._counts[who].merge(Counts(feedback=1, feedback_sum=score))
        return True

    async def variants(self) -> dict[str, Any]:
        """What was counted, by ``VERSION VARIANT``, and since when."""
        return {
            "since": self._since,
            "variants": {" ".join(who): counts.summary() for who, counts in sorted(self._counts.items())},
        }

    async def check_health(self) -> None:
        """Serve starts a replica anew whose clockwork has stopped."""
        if self._clock.done():
            self._clock.result()
