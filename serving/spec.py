"""What a user may say about serving a model. Field names are Ray Serve's and vLLM's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.entities import REGIONS, Region
from cluster.settings import one_line

_WORKERS = ("tensor_parallel_size", "pipeline_parallel_size")
"""Of vLLM's engine: a replica has as many workers as their product."""
_SECTIONS = ("override_generation_config", "structured_outputs_config")
"""Of vLLM's engine: mappings to which Winnow adds its own."""
REPORTS_S = 2
"""Serve's handles, in the ingress, tell of requests every so many seconds. With Serve's own 10, one that found no
replica waited up to 13 before one was begun: a handle tells at once, but what it noted last, mostly that none waits."""
_KNOWN_S = 10
"""After so many, what a new replica is asked is known for certain."""
_ENDS_S = 20
"""What a replica takes to end after its last answer, and for how long its leases may be used when Serve sends nothing
to it any more (``upstream``)."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AutoscalingSpec(_Spec):
    """Ray Serve's ``autoscaling_config``, with limits that Ray Serve LLM leaves open."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    look_back_period_s: Annotated[float, Field(gt=REPORTS_S)] = Field(30, description="The ingress reports every 2 s.")
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] | None = Field(
        None, description="For the last replica, where min_replicas is 0; None for downscale_delay_s."
    )

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas must be at most max_replicas={self.max_replicas}, got {self.min_replicas}")
        return self

    @model_validator(mode="after")
    def _zero_is_certain(self) -> AutoscalingSpec:
        name = "downscale_delay_s" if self.downscale_to_zero_delay_s is None else "downscale_to_zero_delay_s"
        if self.min_replicas == 0 and (delay_s := getattr(self, name)) <= _KNOWN_S:
            raise ValueError(
                f"{name} must be above {_KNOWN_S} s where min_replicas is 0, got {delay_s:g}: "
                "what a new replica is asked may not have been reported before, and it would go"
            )
        return self


class LimitsSpec(_Spec):
    """What one request may ask for. Beyond it: 400, 408 or 413."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    max_prompt_chars: Annotated[int, Field(ge=1)] = Field(200_000, description="All messages or prompts together.")
    max_tokens: Annotated[int, Field(ge=1)] = Field(4096, description="Of one answer, asked for or not.")
    max_n: Annotated[int, Field(ge=1)] = Field(4, description="Answers to one prompt, and prompts in one request.")
    max_stop_strings: Annotated[int, Field(ge=1)] = 8
    max_stop_chars: Annotated[int, Field(ge=1)] = Field(256, description="All stop strings together.")
    max_schema_bytes: Annotated[int, Field(ge=1)] = Field(16_384, description="A JSON schema, grammar or tool list.")
    max_schema_depth: Annotated[int, Field(ge=1)] = 32
    max_regex_chars: Annotated[int, Field(ge=1)] = 512
    prompt_logprobs: bool = Field(
        False, description="Whether a prompt's log-probabilities may be asked for, which take an engine's memory."
    )
    body_timeout_s: Annotated[float, Field(gt=0)] = Field(60, description="For all of the request's body to come.")
    timeout_s: Annotated[float, Field(gt=0)] = Field(600, description="From the request to its last token.")


class FallbackSpec(_Spec):
    """Who answers where the model is overloaded, away, or has no place in time: one of the two."""

    model: str | None = Field(None, description="NAME of another model that is deployed on this cluster, by 'deploy'.")
    base_url: str | None = Field(None, description="An OpenAI-compatible endpoint, up to and with /v1.")
    endpoint_model: str | None = Field(None, description="The model's name there.")
    api_key_env: str | None = Field(None, description="The environment variable of the ingress that holds its key.")
    after_s: Annotated[float, Field(gt=0)] = Field(30, description="How long a request waits for a place in a replica.")

    @model_validator(mode="after")
    def _one(self) -> FallbackSpec:
        if (self.model is None) == (self.base_url is None):
            raise ValueError("fallback takes either model or base_url")
        if (self.base_url is None) != (self.endpoint_model is None):
            raise ValueError("fallback.base_url and fallback.endpoint_model go together")
        return self


class CanarySpec(_Spec):
    """The timetable of an automatic canary, and what it must not do worse than production."""

    steps: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field((5, 25, 50), description="Percent of traffic.")
    step_s: Annotated[float, Field(ge=0)] = Field(600, description="The least that a step takes.")
    min_requests: Annotated[int, Field(ge=1)] = Field(
        50, description="Of each variant in a step, to be judged; plain failures are judged before."
    )
    max_error_increase: Annotated[float, Field(ge=0)] = 0.01
    max_invalid_increase: Annotated[float, Field(ge=0)] = 0.02
    max_latency_ratio: Annotated[float, Field(gt=0)] = Field(1.5, description="95 % latency over production's.")
    min_feedback: Annotated[int, Field(ge=1)] = Field(20, description="Of each variant in a step, to be judged.")
    max_feedback_loss: Annotated[float, Field(ge=0)] = Field(0.05, description="Of the mean score from 0 to 1.")

    @model_validator(mode="after")
    def _ascending(self) -> CanarySpec:
        if not self.weights or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must be ascending percentages, the first below 100, but got {list(self.steps)}")
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the steps, those that leave production something to be held against: 100 is what follows the last one."""
        return tuple(step for step in self.steps if step < 100)


class SamplingSpec(_Spec):
    """Answered requests that are kept, redacted, in ``WINNOW_HOME/samples``. Without this section none is."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="Of all answered requests.")
    max_per_minute: Annotated[float, Field(gt=0)] = Field(60, description="Of each ingress replica.")
    regions: tuple[Region, ...] = Field(REGIONS, description="Countries whose national ids are looked for.")


class IngressSpec(_Spec):
    """The HTTP front of a model."""

    num_replicas: Annotated[int, Field(ge=1)] = Field(2, description="One takes all where the other is lost.")
    cors_origins: tuple[str, ...] = Field((), description="Origins of pages that may call this from a browser.")
    json_answers: bool = Field(False, description="Every answer without tools has to be JSON; what is not is invalid.")
    limits: LimitsSpec = LimitsSpec()
    sampling: SamplingSpec | None = None


class ServingSpec(_Spec):
    """How one model is deployed."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine as they are.")
    autoscaling_config: AutoscalingSpec = AutoscalingSpec()
    max_ongoing_requests: Annotated[int, Field(ge=1)] = Field(64, description="Requests in one replica at once.")
    max_queued_requests: Annotated[int, Field(ge=1)] = Field(
        256, description="Waiting at each ingress replica; beyond that 503, or the fallback."
    )
    cpus_per_replica: Annotated[float, Field(ge=0)] = Field(
        1, description="Of each worker of its engine; without a GPU its threads, too."
    )
    gpus_per_replica: Annotated[float, Field(ge=0)] = Field(0, description="Of each worker of its engine.")
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600, description="An engine that takes longer for one step is ended, and another one started."
    )
    kv_cache_gib: Annotated[int, Field(ge=1)] = Field(1, description="vLLM's key-value cache on a CPU replica.")
    ingress: IngressSpec = IngressSpec()
    canary: CanarySpec = CanarySpec()
    fallback: FallbackSpec | None = None

    @model_validator(mode="after")
    def _workers_counted(self) -> ServingSpec:
        for name in _WORKERS:
            value = self.engine_kwargs.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"engine_kwargs.{name} must be a whole number above 0, but got {value!r}")
        return self

    @model_validator(mode="after")
    def _sections_are_some(self) -> ServingSpec:
        for name in _SECTIONS:
            if not isinstance(value := self.engine_kwargs.get(name, {}), dict):
                raise ValueError(f"engine_kwargs.{name} must be a mapping, but got {value!r}")
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
    def grace_s(self) -> float:
        """How long a replica that is replaced may take to end: as long as a request that it has just been sent."""
        return self.ingress.limits.body_timeout_s + self.ingress.limits.timeout_s + _ENDS_S

    @property
    def workers(self) -> int:
        """Of one replica's engine."""
        return math.prod(self.engine_kwargs.get(name, 1) for name in _WORKERS)

    @property
    def worker_as_ray(self) -> dict[str, float]:
        """What Ray keeps for one worker of a replica's engine, by its names of resources."""
        return {"CPU": self.cpus_per_replica} | ({"GPU": self.gpus_per_replica} if self.gpus_per_replica else {})

    @property
    def replica_as_ray(self) -> dict[str, float]:
        """The same for one replica, all of its workers together."""
        return {name: amount * self.workers for name, amount in self.worker_as_ray.items() if amount}


def with_changes(registered: Mapping[str, Any], changes: Mapping[str, Any]) -> ServingSpec:
    """How a version is served: what it was registered with, and ``changes`` in the place of single keys.

    Raises:
        ValueError: a changed key is unknown or its value breaks a rule.
    """
    try:
        return ServingSpec.model_validate_json(json.dumps({**registered, **changes}, default=str))
    except ValidationError as error:
        raise ValueError(f"serving.{one_line(error)}") from None
