"""Asks the judge: from the cache what was asked before, and again while a reply is not of its form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from cluster import files, paths, settings
from sweeps.judge.endpoint import Endpoint, Failed, Stopped
from sweeps.judge.questions import Form, Key, Question

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Asked:
    """What became of one question: its answer, None where there is none to be had."""

    answer: Form | None
    cached: bool = False
    broken: int = 0


@dataclass
class Court:
    """One evaluation's questions to one endpoint."""

    endpoint: Endpoint
    cached: int = 0
    """Questions answered without a request of their own: asked before, or the same as another one."""
    broken: int = 0
    """Replies that were not of their form."""
    found: dict[Key, Any] = field(default_factory=dict)
    """The answers, each of its question's form."""

    def ask_all(self, questions: Sequence[Question], log: Log) -> None:
        """Some at a time, in their order, so that a cap leaves every contestant judged on the same prompts.

        Raises:
            ValueError: the endpoint refuses the key, the model or a request.
        """
        alike: dict[str, list[Question]] = {}
        for question in questions:  # contestants often give the same answer
            alike.setdefault(self._digest(question), []).append(question)
        every = max(1, len(alike) // 5)
        pool = ThreadPoolExecutor(self.endpoint.spec.concurrency)
        try:
            for number, ((_, same), asked) in enumerate(
                zip(alike.items(), pool.map(self._ask, alike.items()), strict=True), 1
            ):
                self.cached += len(same) - (not asked.cached)
                self.broken += asked.broken
                self.found |= {question.key: asked.answer for question in same if asked.answer is not None}
                if number % every == 0 and number + every <= len(alike):
                    log(f"judge: {number} of {len(alike)}")
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, alike: tuple[str, list[Question]]) -> _Asked:
        digest, (question, *_) = alike
        file = paths.judge_cache() / f"{digest}.json"
        if file.exists():
            return _Asked(question.form.model_validate(files.read_json(file)), cached=True)
        asked = self._insist(question)
        if asked.answer is not None:
            files.write_json(file, asked.answer.model_dump())
        return asked

    def _insist(self, question: Question) -> _Asked:
        """Asked again, with what was wrong, while the reply is not of its form."""
        messages = [{"role": "user", "content": json.dumps(question.asked, ensure_ascii=False)}]
        for broken in range(self.endpoint.spec.attempts):
            try:
                reply = self.endpoint.ask(question.system, messages)
            except (Failed, Stopped):
                return _Asked(None, broken=broken)
            try:
                return _Asked(question.form.model_validate_json(reply), broken=broken)
            except ValidationError as error:
                wrong = f"That is not the JSON object asked for ({settings.one_line(error)}). Reply with it alone."
                messages += [{"role": "assistant", "content": reply or "(nothing)"}, {"role": "user", "content": wrong}]
        return _Asked(None, broken=self.endpoint.spec.attempts)

    def _digest(self, question: Question) -> str:
        """SHA-256 of all that an answer depends on."""
        spec = self.endpoint.spec
        who = [spec.provider, spec.base_url, spec.model, spec.request, spec.max_tokens]
        words = json.dumps([*who, question.system, question.asked], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()
