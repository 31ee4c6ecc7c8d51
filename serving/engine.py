"""How Serve is to run one registered version, and with what its engine starts. Imports no vLLM: ``replica.py`` does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import ray
from ray import serve

from cluster import paths
from serving import ahead, place
from serving.registry import ModelVersion
from serving.spec import REPORTS_S, ServingSpec

_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
EXECUTOR, _IN_THE_CORE = "distributed_executor_backend", "uni"
"""vLLM's name for a model that the engine's core runs itself."""
STEP_TIMEOUT = "WINNOW_STEP_TIMEOUT_S"
_INDUCTOR = {"TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""vLLM sets them on a CPU, in the replica, when the process that a core is forked from has read them already."""
_STRUCTURED = "structured_outputs_config"
_USUAL = {
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "dtype", "quantization", "enforce_eager", "seed"),
    *("gpu_memory_utilization", "kv_cache_dtype", "enable_prefix_caching", "enable_chunked_prefill"),
    *("tensor_parallel_size", "pipeline_parallel_size", "override_generation_config", _STRUCTURED, EXECUTOR),
}
"""Of the arguments of vLLM's engine."""
_REPLICA = "serving.replica.LeasedServer"
_HEALTH_S = 10
"""Serve asks so often after a replica's health, and waits so long for an answer: Ray Serve LLM's figures."""
QUIET = {"enable_access_log": False}
"""A line a lease says nothing that the counts do not."""


def deployment(version: ModelVersion, spec: ServingSpec, surge: bool, begins: bool) -> serve.Application:
    """What Serve runs: replicas that each take a placement group, as Ray Serve LLM's ``build_llm_deployment`` lays it.

    That builder itself imports vLLM, twelve seconds of a core in each command that only describes an application. So
    Serve is told where the class is.

    Args:
        surge: new replicas may come up beside the old ones.
        begins: it has no deployment yet. Even where no replica may be left later, one shows that it can start.

    Raises:
        ValueError: vLLM's engine has no such argument.
    """
    check_names(spec)
    # Serve comes back to so many whenever a deployment's configuration changes: named once, and only where it matters.
    at_first = {"initial_replicas": 1} if begins and spec.autoscaling_config.min_replicas == 0 else {}
    arguments = llm_arguments(version, spec)
    of_driver = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}  # asked, Ray would start itself
    described: Any = serve.deployment(
        name=version.version,
        autoscaling_config=spec.autoscaling_config.model_dump() | {"metrics_interval_s": REPORTS_S} | at_first,
        max_ongoing_requests=spec.max_ongoing_requests,
        max_queued_requests=spec.max_queued_requests,
        graceful_shutdown_timeout_s=spec.grace_s,
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=_HEALTH_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": {**of_driver, **arguments["runtime_env"]}},
        placement_group_bundles=[spec.worker_as_ray] * spec.workers,
        placement_group_strategy="PACK",
        max_surge_percent=100 if surge else 0,
        logging_config=QUIET,
    )
    return described(_REPLICA).bind(arguments)


def llm_arguments(version: ModelVersion, spec: ServingSpec) -> dict[str, Any]:
    """Of the ``LLMConfig`` with which a replica serves ``version`` as ``model: NAME``."""
    return {
        "model_loading_config": {"model_id": version.model, "model_source": str(version.path)},
        "accelerator_config": {"kind": "gpu" if spec.gpus_per_replica > 0 else "cpu"},
        "placement_group_config": {"bundle_per_worker": spec.worker_as_ray},
        "engine_kwargs": engine_kwargs(spec),
        "runtime_env": {"env_vars": environment(spec) | _kept_compiled(version)},
    }


def check_names(spec: ServingSpec) -> None:
    """vLLM is only asked about names that are not among those which most settings have: it takes its time to load.

    Raises:
        ValueError: it does not know one.
    """
    if not spec.engine_kwargs.keys() - _USUAL:
        return
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = {field.name for arguments in (AsyncEngineArgs, FrontendArgs) for field in fields(arguments)}
    for name in sorted(spec.engine_kwargs.keys() - known):
        near = get_close_matches(name, known, 1)
        mend = f"did you mean '{near[0]}'?" if near else "leave it out"
        raise ValueError(f"serving.engine_kwargs.{name}: must be an argument of vLLM's engine; {mend}")


def engine_kwargs(spec: ServingSpec) -> dict[str, Any]:
    """vLLM's arguments. Answers whose length nobody names are held to the limit too, not only those that ask.

    On a CPU a single worker is the engine's core itself. As a process of its own, which is vLLM's way, it and the core
    wait for each other without a pause, and it is bound to the machine's first core, as the workers of all replicas.

    Grammars are llguidance's, which bounds what a token may cost: of the xgrammar that vLLM takes by itself, a regular
    expression of 33 characters keeps the core in one step for ever. Nor can it change from request to request: the
    first that has a grammar settles it for the engine's life, while each is checked by the one that suits it.
    """
    cap = {"max_new_tokens": spec.ingress.limits.max_tokens}
    kwargs: dict[str, Any] = {EXECUTOR: _IN_THE_CORE} if spec.workers == 1 and not spec.gpus_per_replica else {}
    kwargs |= spec.engine_kwargs
    kwargs[_STRUCTURED] = {"backend": "guidance"} | kwargs.get(_STRUCTURED, {})
    return kwargs | {"override_generation_config": cap | kwargs.get("override_generation_config", {})}


def environment(spec: ServingSpec) -> dict[str, str]:
    """What vLLM takes from its environment. On a CPU it computes on as many cores as the replica is given."""
    everywhere = _OFFLINE | {STEP_TIMEOUT: str(spec.step_timeout_s)}
    if spec.gpus_per_replica > 0:
        return everywhere
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": str(spec.kv_cache_gib)}
    if engine_kwargs(spec).get(EXECUTOR) == _IN_THE_CORE:  # vLLM would take a process of its own all the same
        threads = max(1, int(spec.cpus_per_replica))
        on_cpu |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads), ahead.WANTED: "1"}
        on_cpu |= _INDUCTOR
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
