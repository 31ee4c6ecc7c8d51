"""What a user may say about serving a model. Field names are Ray Serve's and vLLM's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.settings import one_line

_WORKERS = ("tensor_parallel_size", "pipeline_parallel_size")
"""Of vLLM's engine: a replica has as many workers as their product."""


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
    def _workers_counted(self) -> ServingSpec:
        for name in _WORKERS:
            value = self.engine_kwargs.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"engine_kwargs.{name} must be a whole number above 0, but got {value!r}")
        return self

    @model_validator(mode="after")
    def _queue_reachable(self) -> ServingSpec:
        target = self.autoscaling_config.target_ongoing_requests
        if target > self.max_ongoing_requests:
            raise ValueError(
                f"autoscaling_config.target_ongoing_requests must be at most "
                f"max_ongoing_requests={self.max_ongoing_requests}, or no replica is ever added, got {target:g}"
            )
        return self

    @property
    def replica_as_ray(self) -> dict[str, float]:
        """Ray's resource names for one replica, all of its workers together."""
        workers = math.prod(self.engine_kwargs.get(name, 1) for name in _WORKERS)
        wanted = {"CPU": self.cpus_per_replica * workers, "GPU": self.gpus_per_replica * workers}
        return {name: amount for name, amount in wanted.items() if amount}


def with_changes(registered: Mapping[str, Any], changes: Mapping[str, Any]) -> ServingSpec:
    """How a version is served: what it was registered with, and ``changes`` in the place of single keys.

    Raises:
        ValueError: a changed key is unknown or its value breaks a rule.
    """
    try:
        return ServingSpec.model_validate_json(json.dumps({**registered, **changes}, default=str))
    except ValidationError as error:
        raise ValueError(f"serving.{one_line(error)}") from None
