"""A judge's model over HTTP: an OpenAI-compatible or Anthropic endpoint, its calls counted and its spend capped."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainables.spec import JudgeSpec

_RETRIES = 4
"""That the provider's own client makes of a request that was refused for now or failed on the way."""

_FAILURES_IN_A_ROW = 5
"""Of requests, retries included, after which no other is made."""


class Stopped(Exception):
    """No more requests are made: a cap is reached, or the endpoint does not answer."""


class Failed(Exception):
    """One request came to nothing; others may."""


@dataclass
class Account:
    """What was asked of the endpoint so far. Requests count with their retries; those that fail are taken as free."""

    calls: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    spend_usd: float = 0.0
    stopped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"spend_usd": round(self.spend_usd, 6)}


@dataclass(frozen=True)
class Reply:
    """What came back, and the tokens that both sides were counted at; None where the endpoint does not say."""

    text: str
    input_tokens: int | None
    output_tokens: int | None


@dataclass
class Endpoint:
    """Asks one model. Threads may share it: what is under way counts as spent until its true cost is known."""

    spec: JudgeSpec
    account: Account = field(default_factory=Account)

    def __post_init__(self) -> None:
        self._settled, self._held_calls, self._held_usd = threading.Condition(), 0, 0.0
        self._in_a_row, self._refused = 0, False
        key = os.environ.get(self.spec.key_name)
        if not key and not self.spec.is_local:
            raise ValueError(
                f"evaluation.judge: needs its key in the environment variable {self.spec.key_name}, which is not set; "
                "set it, or name another in api_key_env"
            )
        self._client = _client(self.spec, key or "unused", self._count)

    def ask(self, system: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's reply to a conversation.

        Raises:
            Stopped: a cap would be passed, or requests keep failing.
            Failed: this request came to nothing.
            ValueError: the endpoint refuses the key, the model or the request itself.
        """
        most_usd = self._most_usd(system, messages)
        retries = self._reserve(most_usd)
        reply: Reply | None = None
        try:
            reply = _ask(self._client, self.spec, system, messages, retries)
        except ValueError:
            self._refused = True
            raise
        finally:
            self._settle(retries, most_usd, reply)
        return reply.text

    def check(self) -> None:
        """One small request, before anything long is begun.

        Raises:
            ValueError: the endpoint cannot be reached, or refuses the key or the model.
        """
        try:
            self.ask("Reply with the word ok.", [{"role": "user", "content": "ok?"}])
        except (Failed, Stopped) as error:
            raise ValueError(f"evaluation.judge: {error}") from None

    def _count(self, _: Any) -> None:
        with self._settled:
            self.account.calls += 1

    def _most_usd(self, system: str, messages: Sequence[Mapping[str, str]]) -> float:
        """More than a request can cost: no tokenizer makes more tokens of a text than it has bytes."""
        sent = len(json.dumps([system, *map(dict, messages)]).encode())
        limits = [self.spec.request.get(name) or 0 for name in ("max_tokens", "max_completion_tokens")]
        return self._usd(sent, max(limits) or self.spec.max_tokens)

    def _usd(self, input_tokens: int, output_tokens: int) -> float:
        prices = self.spec.usd_per_million_input_tokens or 0.0, self.spec.usd_per_million_output_tokens or 0.0
        return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6

    def _reserve(self, most_usd: float) -> int:
        """Room for one request, and for retries if there is any left; waits for what others may give back."""
        with self._settled:
            self._settled.wait_for(lambda: self._obstacle(most_usd) is None or not self._held_calls)
            if obstacle := self._obstacle(most_usd):
                self.account.stopped = obstacle
                raise Stopped(obstacle)
            retries = min(_RETRIES, self._calls_left() - 1)
            self._held_calls += 1 + retries
            self._held_usd += most_usd
            return retries

    def _calls_left(self) -> int:
        return self.spec.max_calls - self.account.calls - self._held_calls

    def _obstacle(self, most_usd: float) -> str | None:
        """Why no request of this cost can be made now."""
        spent, limit = self.account.spend_usd, self.spec.max_spend_usd
        if self._refused:
            return "the endpoint refused a request"
        if self._in_a_row >= _FAILURES_IN_A_ROW:
            return f"{self._in_a_row} requests in a row failed"
        if self._calls_left() < 1:
            return f"max_calls {self.spec.max_calls} is reached"
        if limit is not None and spent + self._held_usd + most_usd > limit:
            return f"max_spend_usd {limit:g} could be passed, {spent:.4f} are spent"
        return None

    def _settle(self, retries: int, most_usd: float, reply: Reply | None) -> None:
        """What was held is given back, and what it came to is counted."""
        with self._settled:
            self._held_calls -= 1 + retries
            self._held_usd -= most_usd
            self._settled.notify_all()
            if reply is None:
                self.account.failed += 1
                self._in_a_row += 1
                return
            self._in_a_row = 0
            self.account.input_tokens += reply.input_tokens or 0
            self.account.output_tokens += reply.output_tokens or 0
            known = reply.input_tokens is not None and reply.output_tokens is not None
            self.account.spend_usd += (
                self._usd(reply.input_tokens or 0, reply.output_tokens or 0) if known else most_usd
            )


def _client(spec: JudgeSpec, key: str, count: Any) -> Any:
    """The provider's own client. Every request, retries too, goes past ``count``."""
    library: Any = importlib.import_module(spec.provider)
    make = library.Anthropic if spec.provider == "anthropic" else library.OpenAI
    http = library.DefaultHttpxClient(event_hooks={"request": [count]})
    return make(api_key=key, base_url=spec.base_url, timeout=spec.timeout_s, http_client=http)


def _ask(client: Any, spec: JudgeSpec, system: str, messages: Sequence[Mapping[str, str]], retries: int) -> Reply:
    client = client.with_options(max_retries=retries)
    try:
        if spec.provider == "anthropic":  # whose newer models take no temperature
            more = {"max_tokens": spec.max_tokens} | spec.request
            made = client.messages.create(
                model=spec.model,
                system=system,
                messages=list(messages),
                max_tokens=more.pop("max_tokens"),
                extra_body=_without_nulls(more),
            )
            text = "".join(block.text for block in made.content if block.type == "text")
            return Reply(text, made.usage.input_tokens, made.usage.output_tokens)
        more = {"temperature": 0, "max_tokens": spec.max_tokens} | spec.request
        turns = [{"role": "system", "content": system}, *messages]
        made = client.chat.completions.create(model=spec.model, messages=turns, extra_body=_without_nulls(more))
        usage = made.usage
        return Reply(
            made.choices[0].message.content or "", usage and usage.prompt_tokens, usage and usage.completion_tokens
        )
    except Exception as error:  # two libraries' errors, alike in their status and in nothing else
        raise _told(spec, error) from None


def _without_nulls(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keys.items() if value is not None}


def _told(spec: JudgeSpec, error: Exception) -> Exception:
    """An error of the provider's client in one line; never with the key, which only a request's header has."""
    where = f"{spec.model} at {spec.base_url or spec.provider}"
    status = getattr(error, "status_code", None)
    line = " ".join(str(error).split())[:300]
    if status in (400, 401, 403, 404, 422):
        return ValueError(f"evaluation.judge: {where} refuses: {line}; mend evaluation.judge or {spec.key_name}")
    if isinstance(error, KeyError | TypeError | AttributeError | IndexError):
        return Failed(f"{where} sends what is no answer: {type(error).__name__} {line}")
    return Failed(f"{where} does not answer: {line}")
