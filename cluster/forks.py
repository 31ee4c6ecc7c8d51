"""Workers of a Ray cluster on this machine, forked from one process that has imported what they need.

Ray Tune wants a process for each trial, and a packed trial's only hands on what an engine reports: of the two and a
half seconds of a core that one took to start, nearly all were imports. This file is also the program that Ray runs
for a worker of such a cluster: it asks for a fork, and where none is to be had it becomes the worker itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SERVE = "--serve"
_ADDRESS = "socket"
"""Beside the link to this file that Ray is given, in a directory of this user's alone: who can ask runs code as us."""
_LONGEST_ADDRESS = 107
"""Bytes that Linux has room for; workers start by themselves where temporary files lie deeper."""
_FORKED = b"\1"
_MOST_BYTES = 2**20
_REQUEST_S = 5.0
"""For which the process that forks waits for the next bytes of a request."""
_JOB, _RAYLET = "RAY_JOB_ID", "RAY_RAYLET_PID"
"""Ray reads them at its import and never again. There is no raylet yet then: forks watch the driver in its place."""
_FIRST_JOB = "01000000"
"""Of a cluster that has just been started."""
_PRESTART = "RAY_prestart_worker_first_driver"
"""Whether Ray starts workers before there is a job; they could not be forked, having none."""
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@contextmanager
def workers(preload: Sequence[str]) -> Iterator[None]:
    """A cluster that ``ray.init`` starts in the block has its workers forked from a process with these modules.

    The process ends with the block, or with the driver, however that ends, and its forks with their cluster.
    """
    import subprocess
    import tempfile

    import psutil

    place = tempfile.TemporaryDirectory(prefix="winnow-forks-", ignore_cleanup_errors=True)
    with place as directory, socket.socket(socket.AF_UNIX) as listener:
        program, address = Path(directory) / "worker.py", Path(directory) / _ADDRESS
        if len(bytes(address)) > _LONGEST_ADDRESS:
            yield
            return
        program.symlink_to(Path(__file__).resolve())
        listener.bind(str(address))
        listener.listen(socket.SOMAXCONN)
        # OpenBLAS, numpy's library, takes its threads at import; one is what Ray would give to all but larger workers
        own = {_JOB: _FIRST_JOB, _RAYLET: str(os.getpid()), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, __file__, _SERVE, str(listener.fileno()), json.dumps(sys.path), *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env=os.environ | own,
        ) as server:
            listener.close()
            try:
                with _started_by(program):
                    yield
            finally:
                with suppress(psutil.NoSuchProcess):
                    for fork in psutil.Process(server.pid).children():
                        with suppress(psutil.NoSuchProcess):
                            fork.kill()
                server.kill()


@contextmanager
def _started_by(program: Path) -> Iterator[None]:
    """Ray nodes that this process starts in the block run ``program`` for a worker."""
    from ray._private import parameter

    before = os.environ.get(_PRESTART)
    os.environ[_PRESTART] = "false"
    try:
        with replaced(parameter, "RayParams", partial(parameter.RayParams, worker_path=str(program))):
            yield
    finally:
        os.environ.pop(_PRESTART, None)
        os.environ.update({} if before is None else {_PRESTART: before})


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In the block ``owner``, a module or a class, has ``value`` by this name."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _serve(number: str, path: str, *modules: str) -> None:
    """Forks a worker for each that asks, until standard input ends.

    Raises:
        RuntimeError: forks would draw the same ids. Workers start by themselves then, as after any error here.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in all of Ray's processes
    sys.path[:] = json.loads(path)
    _import(modules)
    if not _draw_apart():
        raise RuntimeError("what has been imported drew from Ray's generator of ids")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    listener = socket.socket(fileno=int(number))
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        streams, forked = list[int](), False
        with suppress(OSError, ValueError):  # no request that can be met, or no room for a process
            request = _read(connection, streams)
            forked = os.fork() == 0
        if forked:
            listener.close()
            _run_worker(request, streams, connection)
            return
        connection.close()
        for stream in streams:
            os.close(stream)
    shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)  # the driver was killed, and left it


def _import(modules: Sequence[str]) -> None:
    """Imports without drawing ids: after a draw, Ray's generator would give every fork the same ones.

    Nor does a library find a GPU, which no fork could use after that. Ray has looked before, at its import, which ones
    are to be seen, and goes by that in every fork.
    """
    from ray import ActorClassID, actor

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork has the environment of whom it stands in for
    drawn = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    gc.disable()  # a quarter of the time that imports take goes into collections, which find next to nothing
    with replaced(actor, "ActorClassID", drawn):
        for module in modules:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what a fork shares is then not touched by its own collections
    gc.enable()


def _draw_apart() -> bool:
    """Whether two forks draw ids that differ."""
    from ray import UniqueID

    drawn = set()
    for _ in range(2):
        here, there = os.pipe()
        if os.fork() == 0:
            os.write(there, UniqueID.from_random().binary())
            os._exit(0)
        os.close(there)
        with open(here, "rb") as answer:
            drawn.add(answer.read())
    return len(drawn) == 2


def _read(connection: socket.socket, streams: list[int]) -> dict[str, Any]:
    """What a fork is to be; its standard streams go to ``streams``.

    Raises:
        OSError, ValueError: it is not all there, or for another Python than this.
    """
    connection.settimeout(_REQUEST_S)
    text, received, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
    streams += received
    while more := connection.recv(_MOST_BYTES):
        text += more
    request = json.loads(text)
    if request["python"] != sys.executable:
        raise ValueError(request["python"])
    return request


def _run_worker(request: dict[str, Any], streams: Sequence[int], asked: socket.socket) -> None:
    """In a fork: Ray's own program for a worker, as where it has been started by itself.

    Whoever asked starts it so if this fails before it says that it has become one.
    """
    import ray

    raylet: Any = importlib.import_module("ray._raylet")  # declares less than it has
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # a group, and the score below, are what Ray has given to the program that asked
    _OOM_SCORE.write_text(request["oom_score"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv = request["arguments"]
    sys.path[:] = [str(Path(ray.__file__).with_name("thirdparty_files")), *request["path"]]
    raylet.Config.initialize("")  # by this environment
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own generator does so itself after a fork
    asked.send(_FORKED)
    asked.close()
    runpy.run_path(sys.argv[0], run_name="__main__")


def _is_forked(arguments: Sequence[str]) -> bool:
    """Whether a fork has become the worker that this process was started to be."""
    if os.environ.get(_JOB) != _FIRST_JOB:
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX) as server:
        request = {
            "python": sys.executable,
            "arguments": arguments,
            "path": [os.path.dirname(arguments[0]), *sys.path[1:]],
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "oom_score": _OOM_SCORE.read_text(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        server.connect(str(Path(sys.argv[0]).with_name(_ADDRESS)))
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        server.shutdown(socket.SHUT_WR)
        return server.recv(1) == _FORKED
    return False


def _start() -> None:
    """Be a worker, in a fork or here."""
    spec = find_spec("ray")  # looks for it, and does not load it
    assert spec is not None
    assert spec.submodule_search_locations is not None
    worker = Path(spec.submodule_search_locations[0]) / "_private" / "workers" / "default_worker.py"
    if not _is_forked([str(worker), *sys.argv[1:]]):
        flags = sys.orig_argv[1 : -len(sys.argv)]
        os.execv(sys.executable, [sys.executable, *flags, str(worker), *sys.argv[1:]])  # noqa: S606  it has no shell


if __name__ == "__main__":
    if sys.argv[1] == _SERVE:
        _serve(*sys.argv[2:])
    else:
        _start()
