"""The Ray session: join the cluster that ``RAY_ADDRESS`` names, or start one here and end it again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster import forks

AUTH_TOKEN = Path("~/.ray/auth_token")

# Set before ray is imported. Workers of a local cluster inherit them.
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread of Serve's that polls once more after we left would start a session anew
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # trials that only relay are many, and Ray warns of many processes
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def quieten() -> None:
    """Environment defaults under which Ray leaves standard error to us. Call before importing ray."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def forked(preload: Sequence[str]) -> Iterator[None]:
    """Workers of a local cluster that is started in the block find ``preload`` imported, which begins at once: they are
    forked from a process that has these modules.
    """
    quieten()
    with nullcontext() if os.environ.get("RAY_ADDRESS") else forks.workers(preload):
        yield


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A connection to Ray for the block: ``address``, ``RAY_ADDRESS``, or a local cluster that ends with the block."""
    quieten()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options["include_dashboard"] = False
    with _own_sigterm(), nullcontext() if address else _few_processes():
        ray.init(address or "local", **options)
    protect_token()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _few_processes() -> Iterator[None]:
    """A node that this process starts in the block has none that only autoscalers, dashboards or terminals ask: they
    hold up its start, and its end. Ray has switches for the first and the last, out of ``ray.init``'s reach.
    """
    from ray._private import node, parameter

    switched_off: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    with (
        forks.replaced(parameter, "RayParams", partial(parameter.RayParams, **switched_off)),
        forks.replaced(node.Node, "start_api_server", lambda *_, **__: None),  # but for usage statistics, off here
    ):
        yield


@contextmanager
def trials_like_workers() -> Iterator[None]:
    """Ray Tune's trials in the block start as any worker of a cluster of our own, which has this process's environment.

    Tune gives them some of that environment once more, and for its sake Ray starts each through another process, which
    takes half a second of a core to import Ray.
    """
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    from ray.tune.execution import class_cache

    with (
        forks.replaced(class_cache, "DEFAULT_ENV_VARS", {}),
        forks.replaced(class_cache, "ENV_VARS_TO_PROPAGATE", frozenset()),
    ):
        yield


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What the process does at SIGTERM stays its own affair; Ray has its drivers end without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


def require_token() -> None:
    """Token authentication for a cluster of our own, on its nodes and on us; makes the token at the first call.

    Before ray is imported: it reads the mode once.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not AUTH_TOKEN.expanduser().exists() and not os.environ.get("RAY_AUTH_TOKEN"):
        subprocess.run([ray_command(), "get-auth-token", "--generate"], check=True, capture_output=True)
    protect_token()


def protect_token() -> None:
    """Make Ray's authentication token readable by its owner alone; ``ray.init`` may write it world-readable."""
    token = AUTH_TOKEN.expanduser()
    if token.exists() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


@dataclass(frozen=True)
class Head:
    """A Ray head node that outlives its starter. ``started`` tells its process from a later one of the same number."""

    address: str
    pid: int
    started: float
    metrics_port: int = 0
    """Where Ray exports metrics, its own and its applications', for Prometheus."""

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def stop(self, timeout_s: float = 5) -> None:
        """End this node and every process of it; no other Ray on the machine is touched."""
        if not self.is_alive():
            return
        head = psutil.Process(self.pid)
        known = {head, *head.children(recursive=True)}
        head.terminate()  # ray start --block ends its own in order
        deadline, killing = time.monotonic() + timeout_s, False
        while left := [process for process in known | of_session(self.pid) if _runs(process)]:
            if killing and time.monotonic() > deadline + timeout_s:
                break  # nothing ends a process that the kernel holds
            if time.monotonic() > deadline:
                killing = True
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.2)
        self._forget()

    def _forget(self) -> None:
        """Take back the note by which every ``ray.init()`` on this machine finds this node, for it would hang."""
        from ray._common.utils import get_ray_address_file

        note = Path(get_ray_address_file(None))
        with suppress(FileNotFoundError):  # or another node's, which has just ended too
            if note.read_text().strip().rpartition(":")[2] == self.address.rpartition(":")[2]:
                note.unlink()


def of_session(leader: int) -> set[psutil.Process]:
    """Processes of the session that ``leader`` began, those among them that have lost their parent: an engine, for one,
    that was being born while its deployment ended.
    """
    found = set()
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.add(process)
    return found


def _runs(process: psutil.Process) -> bool:
    """False for a zombie too: in a container nobody may be there to collect it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_head(
    log: Path, dashboard_port: int | None = None, timeout_s: float = 60, environment: Mapping[str, str] | None = None
) -> Head:
    """Start a Ray head node with token authentication, in a session of its own, its output in ``log``.

    Args:
        dashboard_port: serve Ray's dashboard, which takes jobs, on this port of loopback; None serves none.
        environment: of its processes, beside this one's.

    Raises:
        RuntimeError: it ended, or did not answer within ``timeout_s``; the message carries its last words.
    """
    quieten()
    require_token()
    from ray._common.network_utils import find_free_port

    named = ("--port", "--ray-client-server-port", "--metrics-export-port", "--dashboard-agent-listen-port")
    ports = {name: find_free_port() for name in named}  # of another node here that took Ray's own, jobs find no agent
    command = [ray_command(), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--disable-usage-stats", *(f"{name}={port}" for name, port in ports.items())]
    command += [f"--include-dashboard={'true' if dashboard_port else 'false'}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard_port}"] if dashboard_port else []
    # jobs say 'python': let them find the one that runs this
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    log.parent.mkdir(parents=True, exist_ok=True)
    deadline, others = time.monotonic() + timeout_s, set(psutil.Process().children())

    def known(process: psutil.Process) -> Head:
        return Head(f"127.0.0.1:{ports['--port']}", process.pid, process.create_time(), ports["--metrics-export-port"])

    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | own | dict(environment or {}),
            )
        head = known(psutil.Process(process.pid))
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed: {log.read_text(errors='replace').strip()[-500:]}")
            time.sleep(0.2)
        protect_token()
    except BaseException:  # interrupted, too, even before ``Popen`` has told of it: nobody else knows of it
        for child in set(psutil.Process().children()) - others:
            with suppress(psutil.NoSuchProcess):
                known(child).stop()
        raise
    return head


def ray_command() -> str:
    """The ``ray`` program that belongs to this interpreter."""
    beside = Path(sys.executable).with_name("ray")
    return str(beside) if beside.exists() else "ray"


def use_what_ray_gave() -> None:
    """In a task or an actor, before torch looks for a GPU: it finds none where Ray gave none, and as many threads.

    Ray leaves all of a node's GPUs to be seen then, and engines of a serving cluster need it so. Threads torch counts
    when it is imported, which in a forked worker lies behind.
    """
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of nested loops a user may name more
    if (torch := sys.modules.get("torch")) and threads.isdecimal():
        torch.set_num_threads(int(threads))


def logs() -> Path:
    """Where this node of the connected cluster keeps its logs; they stay when it ends."""
    from ray._private.worker import global_worker

    assert global_worker.node is not None, "connected"
    return Path(global_worker.node.get_logs_dir_path())


def memory_of_cores(cpus: float) -> float:
    """Bytes of this machine's memory that go with so many of its cores; a container's limits count."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_num_cpus

    return get_system_memory() * min(1.0, cpus / get_num_cpus())


def check_fits(who: str, wanted: dict[str, float], total: dict[str, float], mend: str) -> None:
    """Whether ``who``, of ``wanted`` resources, fits a cluster of ``total``.

    Args:
        mend: how a user asks for less.

    Raises:
        ValueError: more of a resource is wanted than the whole cluster has, so it would wait for ever.
    """
    for name, amount in wanted.items():
        if amount > total.get(name, 0):
            has = total.get(name, 0)
            raise ValueError(f"{who} wants {amount:g} {name} but the cluster has {has:g}; {mend}, or use a larger one")
