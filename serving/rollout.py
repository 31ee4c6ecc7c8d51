"""Deploying registered versions on Ray Serve: on the cluster that ``RAY_ADDRESS`` names, or on one started here."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cluster import files, paths, session
from serving import registry
from serving.registry import ModelVersion
from serving.spec import with_changes

HOST, PORT = "127.0.0.1", 8000
_OTHERWISE = "a YAML file of 'serving' keys, named with --settings"
_POLL_S, _TELL_S = 0.5, 15
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
Log = Callable[[str], None]


def deploy(reference: str, wanted_port: int | None, changes: dict[str, Any], log: Log) -> dict[str, Any]:
    """Serve ``MODEL[@VERSION]`` until ``stop``; returns once it has answered a request over HTTP.

    Deploying another version of a model replaces the one that runs, replica by replica.

    Args:
        wanted_port: on loopback; None for the one that serving has already, or 8000.
        changes: keys of a definition's serving section, in the place of those that the version was registered with.

    Raises:
        ValueError: no such model or version, settings that break a rule or that vLLM refuses, a port that is taken,
            or a cluster too small.
        RuntimeError: the application did not come up, or does not answer.
    """
    version = registry.find(reference)
    spec, port = with_changes(version.record["serving"], changes), _port(wanted_port)
    log(f"deploy: {version.model}@{version.version}; the engine takes about a minute to start")
    with _cluster(log, start=True):
        import ray
        from ray import serve

        mend = f"ask for less in {_OTHERWISE}"
        session.check_fits("serving: a replica", spec.replica_as_ray, ray.cluster_resources(), mend)

        from serving.app import AppArgs, build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it prints every option otherwise
        started = time.monotonic()
        application = build(AppArgs(model=f"{version.model}@{version.version}", serving=changes))
        serve.start(http_options={"host": HOST, "port": port})
        url = f"http://{HOST}:{port}/v1"
        with _none_left_half_up(version.model):
            serve.run_many([serve.RunTarget(application, version.model)], wait_for_applications_running=False)
            _wait_until_running(version.model, log)
            _ask(url, version)
        log(f"ready after {time.monotonic() - started:.0f} s: {url}")
    _remember(apps={version.model: version.version}, port=port)
    return {"model": version.model, "version": version.version, "url": url}


def status() -> dict[str, Any]:
    """What runs: each deployed model with its version and its replicas by state."""
    with _cluster(print, start=False) as running:
        if not running:
            return {"applications": {}}
        from ray import serve

        versions = _state().get("apps", {})
        applications = {
            name: {
                "version": versions.get(name),
                "status": app.status.value,
                "replicas": {key: dict(one.replica_states) for key, one in app.deployments.items()},
            }
            for name, app in serve.status().applications.items()
        }
    return {"applications": applications, "url": f"http://{HOST}:{_state().get('port', PORT)}/v1"}


def stop(log: Log) -> dict[str, Any]:
    """Stop serving; a cluster that ``deploy`` started ends too."""
    state = _state()
    if head := _head(state):  # the cluster is ours: it goes with all that runs on it
        log("stop: ending the Ray cluster that deploy started")
        head.stop()
    elif state:
        with _cluster(log, start=False) as running:
            if running:
                from ray import serve

                for name in state.get("apps", {}):
                    log(f"stop: {name}")
                    serve.delete(name)
    paths.serving_state_file().unlink(missing_ok=True)
    return {"stopped": sorted(state.get("apps", {}))}


@contextmanager
def _cluster(log: Log, start: bool) -> Iterator[bool]:
    """Connected to the serving cluster for the block; False where there is none and ``start`` is not set.

    A cluster that was started here ends again if the block fails.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or _own_address()
    if not address and not start:
        yield False
        return
    if address:
        if address == _own_address():
            session.require_token()
        with session.connected(address=address):
            yield True
        return
    log("deploy: starting a Ray cluster on this machine")
    head = session.start_head(paths.serving_log())
    _remember(head=asdict(head))
    try:
        with session.connected(address=head.address):
            yield True
    except BaseException:
        head.stop()
        paths.serving_state_file().unlink(missing_ok=True)
        raise


def _port(wanted: int | None) -> int:
    """The HTTP port to serve on: the first deployment on a cluster chooses it.

    Raises:
        ValueError: it is another one already, or another program listens there.
    """
    if _own_address() and (now := _state().get("port")):
        if wanted not in (None, now):
            raise ValueError(f"--port: serving listens on {now} already, but got {wanted}; leave it out, or stop first")
        return now
    port = PORT if wanted is None else wanted
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            if not os.environ.get("RAY_ADDRESS"):  # there it may be Serve itself that listens
                raise ValueError(f"--port: must be a free port, but {port} is not: {error}; name another one") from None
    return port


def _own_address() -> str | None:
    head = _head(_state())
    return head.address if head and head.is_alive() else None


def _head(state: dict[str, Any]) -> session.Head | None:
    return session.Head(**state["head"]) if "head" in state else None


def _state() -> dict[str, Any]:
    file = paths.serving_state_file()
    return files.read_json(file) if file.exists() else {}


def _remember(**facts: Any) -> None:
    files.write_json(paths.serving_state_file(), _state() | facts)


@contextmanager
def _none_left_half_up(name: str) -> Iterator[None]:
    """An application that was not there before the block goes again if the block fails."""
    from ray import serve

    is_new = name not in serve.status().applications
    try:
        yield
    except BaseException:
        if is_new:
            serve.delete(name)
        raise


def _wait_until_running(name: str, log: Log) -> None:
    """Until the application runs; says now and then what it waits for.

    Raises:
        ValueError: vLLM refused its settings.
        RuntimeError: it failed for another reason; the line carries the replica's last error.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    started = told = time.monotonic()
    while (app := serve.status().applications[name]).status is not ApplicationStatus.RUNNING:
        if app.status is ApplicationStatus.DEPLOY_FAILED:
            raise _failure(name, " ".join([app.message, *(one.message for one in app.deployments.values())]))
        if (now := time.monotonic()) - told >= _TELL_S:
            told = now
            states = (f"{key} {' '.join(one.replica_states)}" for key, one in app.deployments.items())
            log(f"deploy: {now - started:.0f} s: {', '.join(states)}")
        time.sleep(_POLL_S)


def _failure(name: str, message: str) -> Exception:
    """What Serve says of an application that failed, as one line: a message of its holds tracebacks, one in another."""
    starts = [found.end() for found in re.finditer(r"^[\w.]*(?:Error|Exception): ", message, re.MULTILINE)]
    cause = textwrap.shorten(message[starts[-1] if starts else 0 :], 400)
    if "vLLM engine config" in cause:
        return ValueError(f"serving.engine_kwargs: {cause}; give others in {_OTHERWISE}")
    return RuntimeError(f"{name} did not come up: {cause}; replicas' logs: {session.logs()}/serve")


def _ask(url: str, version: ModelVersion, timeout_s: float = 120) -> None:
    """One real chat request through proxy, ingress and engine."""
    body = {"model": version.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    request = urllib.request.Request(  # noqa: S310  our own loopback address
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            json.load(response)
    except urllib.error.URLError as error:
        raise RuntimeError(f"{version.model} is deployed but does not answer at {url}: {error}") from error
