"""The engine: one registered version as Ray Serve LLM's configuration of vLLM. vLLM itself loads only in replicas."""

from __future__ import annotations

from typing import Any

from ray.serve.llm import LLMConfig, LLMServer

from serving.registry import ModelVersion
from serving.spec import ServingSpec

_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class WarmServer(LLMServer):
    """A replica that has generated once before Serve calls it ready: the first user does not wait for warm-up."""

    async def start(self) -> None:
        await super().start()
        from ray.serve.llm.openai_api_models import CompletionRequest

        request = CompletionRequest.model_validate(
            {"model": self._llm_config.model_id, "prompt": "warm up", "max_tokens": 4, "temperature": 0}
        )
        async for _ in await self.completions(request):
            pass


def llm_config(version: ModelVersion, spec: ServingSpec) -> LLMConfig:
    """The configuration under which Serve runs ``version`` as ``model: NAME``."""
    on_gpu = spec.gpus_per_replica > 0
    bundle: dict[str, Any] = {"CPU": spec.cpus_per_replica}
    if on_gpu:
        bundle["GPU"] = spec.gpus_per_replica
    environment = dict(_OFFLINE)
    if not on_gpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(spec.kv_cache_gib)
    return LLMConfig(
        model_loading_config={"model_id": version.model, "model_source": str(version.path)},
        accelerator_config={"kind": "gpu" if on_gpu else "cpu"},  # type: ignore[arg-type]
        placement_group_config={"bundle_per_worker": bundle},
        engine_kwargs=dict(spec.engine_kwargs),
        deployment_config={
            "autoscaling_config": spec.autoscaling_config.model_dump(),
            "max_ongoing_requests": spec.max_ongoing_requests,
            "max_queued_requests": spec.max_queued_requests,
            "ray_actor_options": {"num_cpus": 0},
        },
        server_cls=WarmServer,
        runtime_env={"env_vars": environment},
        experimental_configs={"stream_batching_interval_ms": 0},
    )
