"""What a user may say about serving a model. Field names are Ray Serve's and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AutoscalingSpec(_Spec):
    """Ray Serve's ``autoscaling_config``, with limits that Ray Serve LLM leaves open."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas must be at most max_replicas={self.max_replicas}, got {self.min_replicas}")
        return self


class ServingSpec(_Spec):
    """How one model is deployed."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine as they are.")
    autoscaling_config: AutoscalingSpec = AutoscalingSpec()
    max_ongoing_requests: Annotated[int, Field(ge=1)] = Field(64, description="Requests in one replica at once.")
    max_queued_requests: Annotated[int, Field(ge=1)] = Field(256, description="Waiting beyond that: 503.")
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    kv_cache_gib: Annotated[int, Field(ge=1)] = Field(1, description="vLLM's key-value cache on a CPU replica.")

    @model_validator(mode="after")
    def _queue_reachable(self) -> ServingSpec:
        target = self.autoscaling_config.target_ongoing_requests
        if target > self.max_ongoing_requests:
            raise ValueError(
                f"autoscaling_config.target_ongoing_requests must be at most "
                f"max_ongoing_requests={self.max_ongoing_requests}, or no replica is ever added, got {target:g}"
            )
        return self
