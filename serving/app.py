"""The Serve application of one model: ``serve run serving.app:build model=NAME``, or a RayService's import path."""

# No postponed annotations here: Serve reads build's to know that its arguments are AppArgs.
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application
from ray.serve.llm import build_openai_app

from serving import registry
from serving.engine import llm_config
from serving.spec import ServingSpec, with_changes


class AppArgs(BaseModel):
    """What the builder takes: a registered model, ``NAME`` or ``NAME@VERSION``, and how to serve it here."""

    model_config = ConfigDict(extra="forbid")

    model: str
    serving: dict[str, Any] = {}
    """Keys of a definition's serving section, in the place of those that the version was registered with."""


def build(args: AppArgs) -> Application:
    """The OpenAI-compatible application of ``args.model``: ingress and engine, both with limits.

    Raises:
        ValueError: no such model or version, or settings that break a rule.
    """
    version = registry.find(args.model)
    spec = with_changes(version.record["serving"], args.serving)
    return build_openai_app(
        {"llm_configs": [llm_config(version, spec)], "ingress_deployment_config": _ingress_options(spec)}
    )


def _ingress_options(spec: ServingSpec) -> dict[str, Any]:
    """The ingress takes what all replicas together take, and queues no more than one of them."""
    ongoing = spec.max_ongoing_requests * spec.autoscaling_config.max_replicas
    return {
        "num_replicas": 1,
        "max_ongoing_requests": ongoing + spec.max_queued_requests,
        "max_queued_requests": spec.max_queued_requests,
        "ray_actor_options": {"num_cpus": 0},
    }
