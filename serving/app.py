"""The Serve application of one model: ``serve run serving.app:build model=NAME``, or a RayService's import path.

It holds the ingress, the conductor, and a deployment for each version that is kept warm, named as the version is.
"""

# No postponed annotations here: Serve reads build's to know that its arguments are AppArgs.
import json
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from serving import conductor, engine, front, place, registry
from serving.spec import ServingSpec, with_changes


class AppArgs(BaseModel):
    """What the builder takes: a registered model, ``NAME`` or ``NAME@VERSION``, and how to serve it here."""

    model_config = ConfigDict(extra="forbid")

    model: str
    serving: dict[str, Any] = {}
    """Keys of a definition's serving section, in the place of those that each version was registered with."""
    beside: list[str] = []
    """More versions to be deployed."""
    warm: list[str] | None = None
    """Of all these, the ones that take requests already; None for all."""
    begin: list[str] = []
    """Of all these, the ones that have no deployment yet."""
    surge: bool = True
    """The cluster has room for new replicas beside the old ones while settings change."""
    listens: tuple[str, int] | None = None
    """Host and port on which the ingress listens itself; None leaves HTTP to Serve's proxies, which take longer."""
    node: str | None = None
    """The address of the node on which it does."""


def build(args: AppArgs) -> Application:
    """The OpenAI-compatible application of ``args.model``: ingress and engines, all with limits.

    What did not change since the application was last built keeps its replicas (``_pinned``): a version comes and
    goes without a restart of the others or of the ingress.

    Raises:
        ValueError: no such model or version, or settings that break a rule.
    """
    first = registry.find(args.model)
    versions = {name: registry.find(f"{first.model}@{name}") for name in dict.fromkeys([first.version, *args.beside])}
    specs = {name: with_changes(version.record["serving"], args.serving) for name, version in versions.items()}
    spec = specs[first.version]
    shared = {
        "model": first.model,
        "settings": json.loads(spec.model_dump_json(include={"ingress", "canary", "fallback"})),
        "listens": args.listens,
        "loopback": place.is_loopback(args.listens[0] if args.listens else _host()),
    }
    engines = [
        _engine(version, specs[name], args.surge, begins=name in args.begin) for name, version in versions.items()
    ]
    ways = [_pinned(_conductor(shared), front.fingerprint(**shared)), *engines]
    options = _ingress_options(list(specs.values()), args.warm or list(versions), args.node)
    deployed: Any = serve.deployment(front.deployable(first.model, spec.ingress), name="ingress", **options)
    # The ways stand in the ingress's arguments only to belong to the application: it finds them by their names.
    return _pinned(deployed.bind(**shared, deployed=ways), front.fingerprint(**shared))


def _host() -> str:
    """Where Serve listens, if it runs; ``serve run`` would start it on loopback."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return client.http_config.host if client else "127.0.0.1"


def _engine(version: registry.ModelVersion, spec: ServingSpec, surge: bool, begins: bool) -> Application:
    return _pinned(engine.deployment(version, spec, surge, begins), engine.fingerprint(version, spec))


def _conductor(shared: dict[str, Any]) -> Application:
    deployed: Any = serve.deployment(
        conductor.Conductor,
        name=conductor.NAME,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config=engine.QUIET,
    )
    return deployed.bind(shared["model"], shared["settings"])


def _ingress_options(specs: list[ServingSpec], warm: list[str], node: str | None) -> dict[str, Any]:
    """The ingress takes what all replicas of all versions take and queue: who has to wait waits for an engine."""
    most = sum(
        one.max_ongoing_requests * one.autoscaling_config.max_replicas + one.max_queued_requests for one in specs
    )
    return {
        "num_replicas": specs[0].ingress.num_replicas,
        "max_ongoing_requests": 2 * most,
        "max_queued_requests": most,
        "graceful_shutdown_timeout_s": specs[0].grace_s,
        "ray_actor_options": {"num_cpus": 0, "resources": {f"node:{node}": 0.001} if node else {}},
        "max_surge_percent": 100,
        "logging_config": engine.QUIET,
        "user_config": {"warm": warm},
    }


def _pinned(application: Application, fingerprint: str) -> Application:
    """With a version by which Serve knows that its replicas need no restart. It takes a random one otherwise, and
    would start every engine anew whenever an application changes."""
    deployment = application._bound_deployment.options(version=fingerprint, _internal=True)
    application._bound_deployment = deployment
    return application
