"""A model's application brought from the versions that it has to the ones that it should have, and waited for.

A new version first comes up without traffic, then the ingress is told of it, and only then an old one goes.
"""

from __future__ import annotations

import asyncio
import json
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster import session
from serving import place, registry
from serving.place import POLL_S, TELL_S, Deployed, Log
from serving.spec import ServingSpec, with_changes

OTHERWISE = "a YAML file of 'serving' keys, named with --settings"
"""Where a user gives other settings."""
_UNPLACED = "to be scheduled"
"""In what Serve says of a deployment, after 30 s, whose replicas no node has taken."""
_TOLD_S, _SETTLE_S = 1.0, 1.0
"""How long it takes until every ingress replica has been told what Serve was, and then until it goes by that."""
_ROOM_S = 900.0
"""How long a replica may wait for room: where a cluster grows by itself, a node with a GPU takes minutes to come."""


def bring(model: str, now: Deployed, versions: Sequence[str], log: Log, served: str | None = None) -> None:
    """Make exactly ``versions`` warm. The first of them answers where no alias says otherwise.

    Args:
        now: what is deployed already, with the settings and the address that are wanted.
        served: what the traffic went to when that was decided, if not to what it goes to now.

    Raises:
        ValueError: vLLM refused its settings, or no room came for a version.
        RuntimeError: a version did not come up, or does not answer. What was there before goes on serving.
    """
    wanted, have = tuple(dict.fromkeys(versions)), now.versions
    new = [version for version in wanted if version not in have]
    changed = _changed(model, now, set(wanted) & set(have))
    room, all_stay = _room(model, new + changed, now), set(have) <= set(wanted)
    if have and not room and all_stay and new:
        log(f"deploy: no room for {', '.join(new)} beside what runs; waiting for replicas to end, or nodes to come")
    elif have and not room:
        log("deploy: no room for old and new at once; requests wait until the new replica is up")
    served = served or registry.aliases(model).get(registry.SERVED)
    with _undone(model, now, room, log) as before:
        beside = have and new and (room or all_stay)
        if beside:
            _apply(model, now, (*have, *new), have, room, log)
            _answered(model, new, log)
        if before:  # from now on nobody may count on what is to leave
            place.remember(model, replace(now, versions=wanted))
            moved = registry.aliases(model).get(registry.SERVED)
            if moved != served and moved in have:  # another command has, meanwhile
                wanted = tuple(dict.fromkeys([*wanted, moved]))
                place.remember(model, replace(now, versions=wanted))
        staying = [version for version in have if version in wanted]
        if before and not room and len(staying) < len(have):  # a request to one that has gone would wait for ever
            old = replace(now, settings=before.settings)
            _run(model, old, tuple(dict.fromkeys([*have, *wanted])), staying or wanted, room)
            time.sleep(_TOLD_S + _SETTLE_S)
        both = wanted if not room else tuple(dict.fromkeys([*wanted, *have]))
        _apply(model, now, both, wanted, room, log)
        _answered(model, changed if beside else [*new, *changed], log)
        if set(both) - set(wanted):
            time.sleep(_SETTLE_S)
            _apply(model, now, wanted, wanted, room, log)
    place.remember(model, replace(now, versions=wanted, code=place.code()))


def _answered(model: str, versions: Sequence[str], log: Log) -> None:
    """Each of them has answered, or it is no good."""
    for version in versions:
        asyncio.run(_ask(model, version))
        log(f"deploy: {version} started in {_cold_start(model, version)}")


def _changed(model: str, now: Deployed, versions: Iterable[str]) -> list[str]:
    """Of the versions that are deployed, those whose replicas the new settings, or our own new code, start anew."""
    from serving import engine

    if not now.versions:
        return []
    before = place.deployed()[model]
    if before.code != place.code():
        return list(versions)
    found = {version: registry.find(f"{model}@{version}") for version in versions}
    return [
        name
        for name, version in found.items()
        if len({engine.fingerprint(version, _spec(version, settings)) for settings in (before.settings, now.settings)})
        > 1
    ]


def _spec(version: registry.ModelVersion, settings: dict[str, Any]) -> ServingSpec:
    return with_changes(version.record["serving"], settings)


def _room(model: str, versions: Sequence[str], now: Deployed) -> bool:
    """Whether the cluster can start a replica of each beside all that runs."""
    import ray

    free = ray.available_resources()
    specs = [_spec(registry.find(f"{model}@{version}"), now.settings).replica_as_ray for version in versions]
    return all(sum(spec.get(name, 0) for spec in specs) <= free.get(name, 0) for spec in specs for name in spec)


def _apply(
    model: str,
    now: Deployed,
    versions: Sequence[str],
    warm: Sequence[str],
    room: bool,
    log: Log,
) -> None:
    """Have Serve make the application of ``versions``, of which the warm ones take requests; returns when it runs."""
    _run(model, now, versions, warm, room)
    _wait_until_running(model, log)


def _run(model: str, now: Deployed, versions: Sequence[str], warm: Sequence[str], room: bool) -> None:
    """The same, without waiting for it."""
    from ray import serve
    from ray.util import get_node_ip_address

    from serving.app import AppArgs, build

    first, *beside = versions
    arguments = AppArgs(
        model=f"{model}@{first}",
        serving=now.settings,
        beside=beside,
        warm=list(warm),
        begin=[version for version in versions if version not in now.versions],
        listens=(now.host, now.port),
        node=get_node_ip_address(),
        surge=room,
    )
    target = serve.RunTarget(build(arguments), model, f"/{model}")
    serve.run_many([target], wait_for_applications_running=False)


@contextmanager
def _undone(model: str, now: Deployed, room: bool, log: Log) -> Iterator[Deployed | None]:
    """What was there before, if anything was. If the block fails it is there again, and a new application is gone."""
    from ray import serve

    before = place.deployed().get(model) if now.versions else None
    try:
        yield before
    except BaseException:
        if before is None:
            serve.delete(model, _blocking=False)  # it ends with its cluster, if that is ours, or in its own time
        else:
            log("deploy: back to what ran before")
            place.remember(model, before)
            _apply(model, before, before.versions, before.versions, room, log)
        raise


def _wait_until_running(name: str, log: Log) -> None:
    """Until the application runs; says now and then what it waits for.

    Raises:
        ValueError: vLLM refused its settings, or no room came for a replica.
        RuntimeError: it failed for another reason; the line carries the replica's last error.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    started = told = time.monotonic()
    while (app := serve.status().applications[name]).status is not ApplicationStatus.RUNNING:
        if app.status is ApplicationStatus.DEPLOY_FAILED:
            raise _failure(name, " ".join([app.message, *(one.message for one in app.deployments.values())]))
        now = time.monotonic()
        lacking = {key: one.message for key, one in app.deployments.items() if _UNPLACED in one.message}
        if lacking and now - started > _ROOM_S:
            raise ValueError(_no_room(name, lacking, now - started))
        if now - told >= TELL_S:
            told = now
            states = (
                f"{key} {' '.join(one.replica_states)}{' (no room yet)' if key in lacking else ''}"
                for key, one in app.deployments.items()
            )
            log(f"deploy: {now - started:.0f} s: {', '.join(states)}")
        time.sleep(POLL_S)


def _no_room(name: str, lacking: dict[str, str], waited_s: float) -> str:
    """One line of what Serve says of deployments whose replicas no node has taken."""
    (deployment, message), *_ = lacking.items()
    wanted = re.search(r"required for each replica: (\{.*?\}), total resources available: (\{.*?\})", message)
    needs = f"a replica wants {wanted[1]} and {wanted[2]} is free" if wanted else "no node has taken its replica"
    return (
        f"serving: no room for {name}'s {deployment} in {waited_s:.0f} s: {needs}; others may have grown under load: "
        f"deploy it with a smaller autoscaling_config.max_replicas, {OTHERWISE}, or use a larger cluster"
    )


def _failure(name: str, message: str) -> Exception:
    """What Serve says of an application that failed, as one line: a message of its holds tracebacks, one in another."""
    starts = [found.end() for found in re.finditer(r"^[\w.]*(?:Error|Exception): ", message, re.MULTILINE)]
    cause = textwrap.shorten(message[starts[-1] if starts else 0 :], 400)
    if "vLLM engine config" in cause:
        return ValueError(f"serving.engine_kwargs: {cause}; give others in {OTHERWISE}")
    return RuntimeError(f"{name} did not come up: {cause}; replicas' logs: {session.logs()}/serve")


def _cold_start(model: str, version: str) -> str:
    """What the start of one of its replicas took, in words."""
    from ray import serve

    handle = serve.get_deployment_handle(version, model).options(method_name="cold_start")
    parts = handle.remote().result(timeout_s=60)
    return f"{sum(parts.values()):.0f} s: " + ", ".join(f"{name} {took:.1f} s" for name, took in parts.items())


async def _ask(model: str, version: str, timeout_s: float = 120) -> None:
    """One real chat request to a replica, over HTTP, as the ingress makes it.

    Raises:
        RuntimeError: it is not answered.
    """
    from serving.upstream import Overloaded, Replies

    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    payload = json.dumps(body).encode()
    replies = Replies()
    try:
        route = replies.from_version(model, version, "/v1/chat/completions", payload, timeout_s)
        async with route as reply:
            told = (await reply.read()).decode(errors="replace")
            if reply.status != 200:
                raise RuntimeError(f"{model}@{version} is deployed but answers {reply.status}: {told[:200]}")
    except (Overloaded, TimeoutError) as error:
        raise RuntimeError(f"{model}@{version} is deployed but does not answer: {error}") from error
    finally:
        await replies.close()
