"""Deploying registered versions on Ray Serve: on the cluster that ``RAY_ADDRESS`` names, or on one started here."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster import files, paths, session
from serving import registry
from serving.registry import ModelVersion

HOST, PORT = "127.0.0.1", 8000
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
Log = Callable[[str], None]


def deploy(reference: str, port: int, log: Log) -> dict[str, Any]:
    """Serve ``MODEL[@VERSION]`` until ``stop``; returns once it has answered a request over HTTP.

    Deploying another version of a model replaces the one that runs, replica by replica.

    Raises:
        ValueError: no such model or version.
        RuntimeError: the application did not come up, or does not answer.
    """
    version = registry.find(reference)
    log(f"deploy: {version.model}@{version.version}; the engine takes about a minute to start")
    with _cluster(log, start=True):
        from ray import serve

        from serving.app import AppArgs, build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it prints every option otherwise
        started = time.monotonic()
        serve.start(http_options={"host": HOST, "port": port})
        serve.run(build(AppArgs(model=f"{version.model}@{version.version}")), name=version.model, route_prefix="/")
        url = f"http://{HOST}:{port}/v1"
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
    """Connected to the serving cluster for the block; False where there is none and ``start`` is not set."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or _own_address()
    if not address and not start:
        yield False
        return
    if not address:
        log("deploy: starting a Ray cluster on this machine")
        head = session.start_head(paths.serving_log())
        _remember(head={"address": head.address, "pid": head.pid, "started": head.started})
        address = head.address
    if address == _own_address():
        session.require_token()
    with session.connected(address=address):
        yield True


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
