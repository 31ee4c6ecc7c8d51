"""A replica: Ray Serve LLM's server of vLLM behind leases. Only replicas import this, for it takes ten seconds.

Tokens do not travel through Ray, where each would be a message of its own. A replica listens on a port of its own with
vLLM's HTTP application, and Serve hands out leases of it (``leases.py``). So Serve still balances, queues, limits and
counts, and a token costs what it costs behind bare vLLM.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

from serving import ahead

ahead.begin()  # before the imports below, which take as long
gc.disable()  # until they are done: collections find next to nothing among them, in a quarter of their time

# ruff: noqa: E402
import psutil
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackConfig  # their one home
from ray.serve.llm import LLMConfig, LLMServer
from ray.util import get_node_ip_address

from serving.engine import EXECUTOR, STEP_TIMEOUT
from serving.leases import Leases
from serving.meters import EngineMeters

gc.enable()

_log = logging.getLogger("ray.serve")
PARTS = ("process and imports", "engine and weights", "HTTP application", "warm-up")
"""Of a replica's start, in their order."""
_WARM_UP: tuple[dict[str, Any], ...] = (
    {"max_tokens": 16, "ignore_eos": True, "temperature": 1.0},
    {"max_tokens": 16, "ignore_eos": True, "logprobs": 1},
    {"max_tokens": 4, "structured_outputs": {"choice": ["a", "b"]}},
)
"""Of what vLLM makes when it is first asked for, most is compiled twice: for one request, and for several at once.
Greedy answers need none of it; the first two that sampled held up all others for three to nine seconds each."""
_WATCH_S, _ASK_S, _LAST_WORDS_S = 0.1, 5.0, 0.1
_TELL_S = 5.0


class _OnThisDisk(CallbackBase):
    """A version is a directory that each node has: Ray's tasks that would fetch a model to them take seconds, and find
    nothing to do."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class LeasedServer(LLMServer):
    """A replica: vLLM's engine, warm, behind a port that only leases open."""

    async def __init__(self, arguments: dict[str, Any]) -> None:  # type: ignore[misc]  # as Serve lets it be
        """Starts it; ``arguments`` are those of ``engine.llm_arguments``."""
        config = LLMConfig(
            **arguments,
            log_engine_metrics=False,  # each token would be a message to Ray; ``EngineMeters`` tells the sums
            callback_config=CallbackConfig(callback_class=_OnThisDisk),
            experimental_configs={"stream_batching_interval_ms": 0},
        )
        await super().__init__(config)

    async def _start_engine(self) -> None:
        """Ray's own, but that it tells nobody: an agent for that is one more process with vLLM in it, waited for."""
        assert self.engine is not None, "made just before"
        await self.engine.start()

    def _get_default_engine_class(self) -> Any:
        """Ray's own, but that it keeps to the executor that ``engine_kwargs`` names: Ray takes another on a CPU."""
        from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

        class Engine(VLLMEngine):
            def _start_async_llm_engine(self, arguments: Any, config: Any, group: Any) -> Any:
                if executor := self.llm_config.engine_kwargs.get(EXECUTOR):
                    config.parallel_config.distributed_executor_backend = executor
                with ahead.forked():
                    return super()._start_async_llm_engine(arguments, config, group)

        return Engine

    async def start(self) -> None:
        began = [psutil.Process().create_time(), time.time()]
        await super().start()
        assert self.engine is not None, "started"
        began.append(time.time())
        application: Any = await self.engine.build_asgi_app()
        application.user_middleware.clear()  # of CORS and Prometheus, which are the ingress's, and cost time a token
        application.middleware_stack = application.build_middleware_stack()
        began.append(time.time())
        await self._warm_up()
        began.append(time.time())
        self._parts = dict(zip(PARTS, (after - before for before, after in pairwise(began)), strict=True))
        self._leases = Leases(application, get_node_ip_address(), self.engine.check_health)
        watched = self._end_with_engine(), self._end_when_stuck(), self._tell()
        self._background = [asyncio.create_task(one) for one in watched]

    async def _warm_up(self) -> None:
        """Generate before Serve calls the replica ready: no user waits for what is made at its first use."""
        for wanted in _WARM_UP:
            for at_once in (1, 2):
                await asyncio.gather(*(self._generate(wanted) for _ in range(at_once)))

    async def _generate(self, wanted: dict[str, Any]) -> None:
        from ray.serve.llm.openai_api_models import CompletionRequest

        request = CompletionRequest.model_validate({"model": self._llm_config.model_id, "prompt": "warm up"} | wanted)
        async for _ in await self.completions(request):
            pass

    async def _end_with_engine(self) -> None:
        """A replica whose engine died ends itself: Serve asks after its health every ten seconds only, and would send
        it requests until then. Those that it had are told, and new ones wait for the replica that takes its place."""
        assert self.engine is not None, "started"
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                await self.engine.check_health()
            except Exception:  # whatever it died of
                await asyncio.sleep(_LAST_WORDS_S)
                _end()

    async def _end_when_stuck(self) -> None:
        """The same where the engine's core does not come out of a step: to vLLM that is healthy, and to whoever asks it
        silent for ever. It takes questions between steps."""
        client: Any = self.engine._engine_client  # type: ignore[union-attr]  # vLLM's, of which Ray's engine tells less
        await until_silent(client.is_sleeping, float(os.environ[STEP_TIMEOUT]))
        _log.error("the engine takes longer than step_timeout_s for one step; this replica ends")
        _end()

    async def _tell(self) -> None:
        meters = EngineMeters()
        while True:
            meters.tell()
            await asyncio.sleep(_TELL_S)

    def cold_start(self) -> dict[str, float]:
        """What this replica's start took: seconds by ``PARTS``."""
        return self._parts

    async def lease(self) -> AsyncIterator[tuple[str, str, str]]:
        """``Leases.take``, as a call that Serve routes here."""
        async for one in self._leases.take():
            yield one


def _end() -> None:
    """End this process and all that it began, which would not hear of it."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


async def until_silent(asked: Callable[[], Awaitable[Any]], within_s: float) -> None:
    """Ask again and again until there is no answer in time. An error is one."""
    while True:
        question = asyncio.ensure_future(asked())
        _, silent = await asyncio.wait([question], timeout=within_s)
        if silent:
            question.cancel()
            return
        if not question.cancelled():
            question.exception()  # is seen by whoever looks after its health
        await asyncio.sleep(min(_ASK_S, within_s))
