"""The engine: one registered version as Ray Serve LLM's server of vLLM. vLLM itself loads only in replicas.

Tokens do not travel through Ray, where each would be a message of its own. A replica listens on a port of its own with
vLLM's HTTP application, and Serve hands out leases of it (``leases.py``). So Serve still balances, queues, limits and
counts, and a token costs what it costs behind bare vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import psutil
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackConfig  # their one home
from ray.serve.llm import LLMConfig, LLMServer
from ray.util import get_node_ip_address

from cluster import paths
from serving import place
from serving.leases import Leases
from serving.meters import EngineMeters
from serving.registry import ModelVersion
from serving.spec import ServingSpec

_log = logging.getLogger("ray.serve")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
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
_EXECUTOR, _IN_THE_CORE = "distributed_executor_backend", "uni"
"""vLLM's name for a model that the engine's core runs itself."""
_TELL_S = 5.0
_STEP_TIMEOUT = "WINNOW_STEP_TIMEOUT_S"
_STRUCTURED = "structured_outputs_config"


class _OnThisDisk(CallbackBase):
    """A version is a directory that each node has: Ray's tasks that would fetch a model to them take seconds, and find
    nothing to do."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class LeasedServer(LLMServer):
    """A replica: vLLM's engine, warm, behind a port that only leases open."""

    def _get_default_engine_class(self) -> Any:
        """Ray's own, but that it keeps to the executor that ``engine_kwargs`` names: Ray takes another on a CPU."""
        from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

        class Engine(VLLMEngine):
            def _start_async_llm_engine(self, arguments: Any, config: Any, group: Any) -> Any:
                if executor := self.llm_config.engine_kwargs.get(_EXECUTOR):
                    config.parallel_config.distributed_executor_backend = executor
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
                os._exit(1)

    async def _end_when_stuck(self) -> None:
        """The same where the engine's core does not come out of a step: to vLLM that is healthy, and to whoever asks it
        silent for ever. It takes questions between steps."""
        client: Any = self.engine._engine_client  # type: ignore[union-attr]  # vLLM's, of which Ray's engine tells less
        await until_silent(client.is_sleeping, float(os.environ[_STEP_TIMEOUT]))
        _log.error("the engine takes longer than step_timeout_s for one step; this replica ends")
        for process in psutil.Process().children(recursive=True):
            process.kill()  # it would not hear that its parent ended
        os._exit(1)

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


def llm_config(version: ModelVersion, spec: ServingSpec, begins: bool) -> LLMConfig:
    """The configuration under which Serve runs ``version`` as ``model: NAME``.

    Args:
        begins: it has no deployment yet. Even where no replica may be left later, one shows that it can start.
    """
    on_gpu = spec.gpus_per_replica > 0
    # Serve comes back to so many whenever a deployment's configuration changes: named once, and only where it matters.
    at_first = {"initial_replicas": 1} if begins and spec.autoscaling_config.min_replicas == 0 else {}
    bundle: dict[str, Any] = {"CPU": spec.cpus_per_replica}
    if on_gpu:
        bundle["GPU"] = spec.gpus_per_replica
    return LLMConfig(
        model_loading_config={"model_id": version.model, "model_source": str(version.path)},
        accelerator_config={"kind": "gpu" if on_gpu else "cpu"},  # type: ignore[arg-type]
        placement_group_config={"bundle_per_worker": bundle},
        engine_kwargs=engine_kwargs(spec),
        deployment_config={
            "autoscaling_config": spec.autoscaling_config.model_dump() | at_first,
            "max_ongoing_requests": spec.max_ongoing_requests,
            "max_queued_requests": spec.max_queued_requests,
            "graceful_shutdown_timeout_s": spec.grace_s,
            "ray_actor_options": {"num_cpus": 0},
        },
        server_cls=LeasedServer,
        log_engine_metrics=False,  # each token would be a message to Ray; ``EngineMeters`` tells the sums
        callback_config=CallbackConfig(callback_class=_OnThisDisk),
        runtime_env={"env_vars": environment(spec) | _kept_compiled(version)},
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def engine_kwargs(spec: ServingSpec) -> dict[str, Any]:
    """vLLM's arguments. Answers whose length nobody names are held to the limit too, not only those that ask.

    On a CPU a single worker is the engine's core itself. As a process of its own, which is vLLM's way, it and the core
    wait for each other without a pause, and it is bound to the machine's first core, as the workers of all replicas.

    Grammars are llguidance's, which bounds what a token may cost: of the xgrammar that vLLM takes by itself, a regular
    expression of 33 characters keeps the core in one step for ever. Nor can it change from request to request: the
    first that has a grammar settles it for the engine's life, while each is checked by the one that suits it.
    """
    cap = {"max_new_tokens": spec.ingress.limits.max_tokens}
    kwargs: dict[str, Any] = {_EXECUTOR: _IN_THE_CORE} if spec.workers == 1 and not spec.gpus_per_replica else {}
    kwargs |= spec.engine_kwargs
    kwargs[_STRUCTURED] = {"backend": "guidance"} | kwargs.get(_STRUCTURED, {})
    return kwargs | {"override_generation_config": cap | kwargs.get("override_generation_config", {})}


def environment(spec: ServingSpec) -> dict[str, str]:
    """What vLLM takes from its environment. On a CPU it computes on as many cores as the replica is given."""
    everywhere = _OFFLINE | {_STEP_TIMEOUT: str(spec.step_timeout_s)}
    if spec.gpus_per_replica > 0:
        return everywhere
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": str(spec.kv_cache_gib)}
    if engine_kwargs(spec).get(_EXECUTOR) == _IN_THE_CORE:  # vLLM would take a process of its own all the same
        threads = max(1, int(spec.cpus_per_replica))
        on_cpu |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
    return everywhere | on_cpu


def _kept_compiled(version: ModelVersion) -> dict[str, str]:
    """The caches of vLLM and of what it compiles with. All in them goes by a hash of what it depends on, and most of it
    is the same for each version of a model, so a new one finds it."""
    caches = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {name: str(paths.compiled_dir(version.model, part)) for name, part in caches.items()}


def fingerprint(version: ModelVersion, spec: ServingSpec) -> str:
    """Of all that a replica has to be started anew for: its model, its engine's settings, its place, its code."""
    where = (spec.cpus_per_replica, spec.gpus_per_replica, environment(spec))
    parts = json.dumps([version.version, engine_kwargs(spec), where], sort_keys=True, default=str)
    return hashlib.sha256((parts + place.code()).encode()).hexdigest()[:16]
