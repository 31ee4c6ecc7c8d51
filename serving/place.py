"""Where serving runs: the cluster that ``RAY_ADDRESS`` names or one started here, its port, and what is deployed on it.

What has to be known from one command to the next stands in ``WINNOW_HOME/serving.json``; only this module opens it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from cluster import files, paths, session
from serving import registry
from serving.traffic import Routes

HOST, PORT = "127.0.0.1", 8000
POLL_S, TELL_S = 0.5, 15
"""How often Serve is asked how far something is (0.05 s of a core each), and a person told."""
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
_OF_OUR_CLUSTER = {
    # A replica's code and its handles run in the event loop in which requests arrive: a hop between two threads costs
    # more than what is done in either.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Ten looks a second at what hardly changes take a tenth of a core with nobody asking.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_SERVE_MIN_HANDLE_METRICS_TIMEOUT_S": "20",  # what an ingress that stands still told last counts for so long
}
"""Ray's settings that are read as its processes start."""
_OF_REPLICAS = ("replica", "engine", "ahead", "leases", "listener", "handover", "events", "errors", "meters")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Deployed:
    """One model's application.

    Args:
        versions: that have a deployment, the one first that was deployed last.
        settings: keys of the serving section, in the place of what each version was registered with.
        host, port: where its ingress listens.
        code: of the engines' replicas (``code``), as they were last brought up.
    """

    host: str = HOST
    port: int = PORT
    versions: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""

    @property
    def url(self) -> str:
        """As a client on this machine says it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104  compared, not bound
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"


@contextmanager
def cluster(log: Log, start: bool) -> Iterator[bool]:
    """Connected to the serving cluster for the block; False where there is none and ``start`` is not set.

    A cluster of our own on which nothing is deployed, and which no other command uses, ends if the block fails.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with files.locked(paths.cluster_users_file(), shared=True):
            address = _address(log) if start else os.environ.get("RAY_ADDRESS") or _own_address()
            if not address:
                yield False
                return
            if address == _own_address():
                session.require_token()
            with _connected(address):
                yield True
    except BaseException:
        if start:
            _end_unused()
        raise


def _address(log: Log) -> str:
    """Of the cluster to deploy on, started where there is none."""
    with files.locked(paths.cluster_writing_file()):
        if address := os.environ.get("RAY_ADDRESS") or _own_address():
            return address
        log("deploy: starting a Ray cluster on this machine")
        head = session.start_head(paths.serving_log(), environment=_OF_OUR_CLUSTER)
        files.write_json(paths.serving_state_file(), {"head": asdict(head)})
        return head.address


def start_serve() -> None:
    """Where it does not run yet, without proxies: the ingress listens itself. Two that start it at once would fail."""
    from ray import serve

    with files.locked(paths.cluster_writing_file()):
        serve.start(proxy_location="Disabled")


def _end_unused() -> None:
    with suppress(ValueError), files.held(paths.cluster_users_file(), "others deploy on it"):
        if not deployed() and (head := own_head()):
            head.stop()
            forget()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    with session.connected(address=address):
        from ray import serve  # noqa: F401  it makes its logger as it is imported

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it prints its own slow moments
        try:
            yield
        finally:  # handles poll in a thread that nothing ends: what it comes upon after we left is no news
            for name in ("ray.serve", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def of(model: str, host: str | None, port: int | None) -> Deployed:
    """What is deployed of a model, or nothing yet, with the address that it listens on or is to listen on.

    Raises:
        ValueError: it listens on another one already, or another program does.
    """
    if is_up() and (now := deployed().get(model)):
        for option, wanted, has in (("host", host, now.host), ("port", port, now.port)):
            if wanted not in (None, has):
                raise ValueError(
                    f"--{option}: {model} listens on {has} already, but got {wanted}; leave it out, or stop first"
                )
        return now
    host, port = host or HOST, PORT if port is None else port
    if not 0 < port < 65536:
        raise ValueError(f"--port: must be from 1 to 65535, but got {port}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--port: must be a free port of {host}, but {port} is not: {error}; name another one"
            ) from None
    return Deployed(host, port)


def reserved(port: int) -> AbstractContextManager[None]:
    """Two deployments that look for a free port at once would both find the same one, and share it."""
    otherwise = f"--port: {port} is being taken by another deployment; name another one, or wait until that is done"
    return files.held(paths.port_file(port), otherwise)


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def deployed() -> dict[str, Deployed]:
    """By model."""
    apps = _read().get("apps", {})
    return {model: Deployed(**app | {"versions": tuple(app["versions"])}) for model, app in apps.items()}


def production(model: str, now: Deployed) -> str:
    """The version that ``model: NAME`` reaches, of those that are deployed."""
    return Routes(now.versions, now.versions[0], registry.aliases(model)).production


@lru_cache(maxsize=1)
def code() -> str:
    """Of what an engine's replicas run. With another one they are started anew, whatever else stays."""
    digest = hashlib.sha256()
    for name in _OF_REPLICAS:
        digest.update((paths.package("serving") / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def remember(model: str, now: Deployed) -> None:
    with files.locked(paths.cluster_writing_file()):
        apps = {name: asdict(app) for name, app in (deployed() | {model: now}).items()}
        files.write_json(paths.serving_state_file(), _read() | {"apps": apps})


def end(models: Iterable[str], log: Log) -> None:
    """End applications, and wait until they have: answers that have begun are finished first."""
    from ray import serve

    started = told = time.monotonic()
    for model in set(models) & set(serve.status().applications):
        log(f"stop: {model}")
        serve.delete(model, _blocking=False)
    while left := set(models) & set(serve.status().applications):
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            log(f"stop: {told - started:.0f} s: waiting for the last answers of {', '.join(sorted(left))}")
        time.sleep(POLL_S)


def forget() -> None:
    paths.serving_state_file().unlink(missing_ok=True)


def is_up() -> bool:
    """Whether there is a cluster to be connected to, as far as can be told without asking it."""
    return bool(os.environ.get("RAY_ADDRESS") or _own_address())


def own_head() -> session.Head | None:
    """The head node that ``deploy`` started; it may have ended meanwhile."""
    state = _read()
    return session.Head(**state["head"]) if "head" in state else None


def _own_address() -> str | None:
    head = own_head()
    return head.address if head and head.is_alive() else None


def _read() -> dict[str, Any]:
    file = paths.serving_state_file()
    return files.read_json(file) if file.exists() else {}
