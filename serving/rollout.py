"""What ``python -m serving`` does: deploy, canary, promote, roll back, status, stop.

Traffic moves when an alias does, and an alias is a file that every ingress reads; a version is warm before one points
to it. So moving traffic takes no longer than that file is read, and loses no request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from cluster import files, paths, session
from serving import keys, place, registry
from serving.place import Deployed, Log
from serving.registry import ModelVersion
from serving.spec import ServingSpec, with_changes
from serving.warming import OTHERWISE, bring


def deploy(reference: str, host: str | None, port: int | None, changes: dict[str, Any], log: Log) -> dict[str, Any]:
    """Serve ``MODEL[@VERSION]`` until ``stop``; returns once it has answered.

    Deploying another version of a model, or other settings, replaces what runs: the new replicas come up first where
    the cluster has room for both, and then no request is lost.

    Args:
        host, port: for the ingress of this model; None for those that it has already, or loopback's 8000.
        changes: keys of a definition's serving section, in the place of those that the version was registered with.

    Raises:
        ValueError: no such model or version, settings that break a rule or that vLLM refuses, an address that is
            taken or open without an API key, or a cluster too small.
        RuntimeError: the application did not come up, or does not answer.
    """
    version = registry.find(reference)
    spec = with_changes(version.record["serving"], changes)
    if spec.fallback and spec.fallback.model:
        registry.find(spec.fallback.model)
    with _alone(version.model), place.reserved(place.of(version.model, host, port).port):
        now = replace(place.of(version.model, host, port), settings=changes)  # again: somebody may listen there by now
        _check_open(now.host)
        return _deploy(version, spec, now, log)


def _deploy(version: ModelVersion, spec: ServingSpec, now: Deployed, log: Log) -> dict[str, Any]:
    log(f"deploy: {version.model}@{version.version}; the engine takes about a minute to start")
    started = time.monotonic()
    with place.cluster(log, start=True):
        import ray

        from serving import engine

        engine.check_names(spec)
        mend = f"ask for less in {OTHERWISE}"
        session.check_fits("serving: a replica", spec.replica_as_ray, ray.cluster_resources(), mend)
        place.start_serve()
        registry.end_canary(version.model, "deploy")  # before: it might become production meanwhile
        served = registry.aliases(version.model).get(registry.SERVED)
        if now.versions:  # it may be unknown, or another since a deployment that was killed
            running = place.production(version.model, now)
            served = running if registry.set_served(version.model, running, was=served) else served
        bring(version.model, now, (version.version,), log, served)
        if not registry.set_served(version.model, version.version, was=served):
            log("deploy: another command has moved the traffic meanwhile; see 'python -m serving status'")
        log(f"ready after {time.monotonic() - started:.0f} s: {now.url}")
    return {"model": version.model, "version": version.version, "url": now.url}


def canary(model: str, version: str, weight: float | None, log: Log) -> dict[str, Any]:
    """Bring a version up beside production, and then send it ``weight`` percent of the traffic; None for the steps of
    its timetable, on which it advances or goes back by itself.

    Raises:
        ValueError: no such version, it is production, vLLM does not know an argument of its engine, a weight out of
            range, or the model is not deployed.
    """
    if weight is not None and not 0 < weight <= 100:
        raise ValueError(f"--weight must be above 0 and at most 100 percent, but got {weight:g}")
    found = registry.find(f"{model}@{version}")
    with _alone(model):
        now = _deployed(model)
        with place.cluster(log, start=False):
            from serving import engine

            engine.check_names(with_changes(found.record["serving"], now.settings))
            production = place.production(model, now)
            if found.version == production:
                raise ValueError(f"{model}@{found.version} is production already; a canary is another version")
            registry.settle(model, production, "it is what serves")
            if registry.aliases(model).get(registry.CANARY) != found.version or found.version not in now.versions:
                registry.end_canary(model, "canary")  # one that is gone, too: its weight is not this one's
            bring(model, now, (production, found.version), log)
        if automatic := weight is None:
            spec = with_changes(registry.find(f"{model}@{production}").record["serving"], now.settings)
            weight = spec.canary.weights[0]
        registry.set_canary(model, found.version, weight, "canary", 0 if automatic else None)
    log(f"canary: {weight:g} % of {model} goes to {found.version}{', and more by timetable' if automatic else ''}")
    return {"model": model, "version": found.version, "weight": weight, "automatic": automatic}


def promote(model: str, version: str, log: Log) -> dict[str, Any]:
    """Make a version production. What was production stays warm, to be rolled back to.

    Raises:
        ValueError: no such version, or the model is not deployed.
    """
    found, now = registry.find(f"{model}@{version}"), _deployed(model)
    before = place.production(model, now)
    _warm(model, now, found.version, log)
    registry.settle(model, before, "it is what serves")
    registry.promote(model, found.version, "promote")
    log(f"promote: {model} is {found.version}; {before} stays warm for a rollback")
    return {"model": model, "version": found.version, "previous": before}


def rollback(model: str, log: Log) -> dict[str, Any]:
    """End the canary, whose replicas go then, or else put production back to its previous version.

    Raises:
        ValueError: there is neither, or the model is not deployed.
    """
    now, aliases = _deployed(model), registry.aliases(model)
    if ended := aliases.get(registry.CANARY):
        version = registry.roll_back(model, "rollback")
        log(f"rollback: all of {model} goes to {version}")
        try:
            with _alone(model):
                now = _deployed(model)
                _keep(model, now, [one for one in now.versions if one != ended or one == version], log)
        except ValueError as error:  # traffic has moved, and that is what somebody was in a hurry for
            log(f"rollback: {ended} stays warm: {error}")
    else:
        if previous := aliases.get(registry.PREVIOUS):
            _warm(model, now, previous, log)
        version = registry.roll_back(model, "rollback")
        log(f"rollback: {model} is {version}")
    return {"model": model, "version": version}


def status() -> dict[str, Any]:
    """What runs: each deployed model with its versions, aliases, traffic, replicas by state and what was counted."""
    with place.cluster(print, start=False) as running:
        if not running:
            return {"applications": {}}
        from ray import serve

        apps = serve.status().applications
        known = place.deployed()
        found = {model: _status_of(model, app, known.get(model)) for model, app in apps.items()}
        head = place.own_head()
        return {"applications": found, "metrics": f"http://127.0.0.1:{head.metrics_port}/metrics" if head else None}


def stop(log: Log) -> dict[str, Any]:
    """Stop serving; a cluster that ``deploy`` started ends too."""
    stopped, head = sorted(place.deployed()), place.own_head()
    if head and head.is_alive():  # the cluster is ours: it goes with all that runs on it
        log("stop: ending the Ray cluster that deploy started")
        head.stop()
    elif stopped:
        with place.cluster(log, start=False) as running:
            if running:
                place.end(stopped, log)
    place.forget()
    return {"stopped": stopped}


def _check_open(host: str) -> None:
    if not place.is_loopback(host) and not keys.read():
        raise ValueError(
            f"--host: {host} can be reached from outside, so a key is needed; make one: python -m serving keys add NAME"
        )


def _deployed(model: str) -> Deployed:
    """
    Raises:
        ValueError: the model is not deployed.
    """
    if not place.is_up() or (now := place.deployed().get(model)) is None:
        raise ValueError(f"{model} is not deployed; deploy it first: python -m serving deploy {model}")
    return now


def _warm(model: str, now: Deployed, version: str, log: Log) -> None:
    """Bring a version up if it is not. Where it is, nobody has to be asked, and an alias may be flipped at once."""
    if version not in now.versions:
        with _alone(model):
            now = _deployed(model)
            _keep(model, now, (*now.versions, version), log)


def _keep(model: str, now: Deployed, versions: Sequence[str], log: Log) -> None:
    with place.cluster(log, start=False):
        bring(model, now, versions, log)


def _alone(model: str) -> AbstractContextManager[None]:
    """Two commands that bring versions of a model up and let them go would undo each other's work."""
    otherwise = f"{model} is being deployed by another command; wait until that is done"
    return files.held(paths.serving_lock_file(model), otherwise)


def _status_of(model: str, app: Any, now: Deployed | None) -> dict[str, Any]:
    """One application: Serve's own words, the registry's, and the conductor's."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from serving.conductor import NAME as CONDUCTOR

    found: dict[str, Any] = {
        "status": app.status.value,
        "replicas": {key: dict(one.replica_states) for key, one in app.deployments.items()},
    }
    if now is None:  # another command than ours deployed it
        return {"version": None} | found
    found |= {
        "url": now.url,
        "version": place.production(model, now),
        "versions": list(now.versions),
        "aliases": registry.aliases(model),
        "canary": registry.canary(model),
    }
    try:
        return found | serve.get_deployment_handle(CONDUCTOR, model).variants.remote().result(timeout_s=10)
    except (RayServeException, RayError, TimeoutError):  # being started
        return found | {"variants": {}}
