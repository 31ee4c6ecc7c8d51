"""Workers of a local cluster that are forked: as those that start by themselves, and gone with their cluster."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import forks, session
from sweeps import loading, run

LOADED = run.TRIALS
OF_ITS_OWN = {"RAY_RAYLET_PID", "RAY_JOB_ID", "RAY_prestart_worker_first_driver"}


class Worker:
    def seen(self) -> dict[str, Any]:
        """What it can tell of itself: what is its own, and what should be as any worker's."""
        import numpy
        import ray

        own, status = psutil.Process(), Path("/proc/self/status").read_text().splitlines()
        return {
            "pid": own.pid,
            "parent": own.ppid(),
            "loaded": {LOADED, "torch"} & set(sys.modules),
            "drawn": (ray.UniqueID.from_random().hex(), numpy.random.random()),
            "alike": {
                "program": (sys.argv[0], sys.modules["__main__"].__file__),
                "path": sys.path,
                "directory": os.getcwd(),
                "environment": {name: value for name, value in os.environ.items() if name not in OF_ITS_OWN},
                "nice": own.nice(),
                "oom": Path("/proc/self/oom_score_adj").read_text(),
                "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
                "leads its group": os.getpgid(0) == own.pid,
                "session": os.getsid(0),
                "signals": [line for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))],
            },
        }


def workers(count: int) -> list[dict[str, Any]]:
    """What so many that run at once tell."""
    import ray

    kept: list[Any] = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(count)]
    return ray.get([worker.seen.remote() for worker in kept])


def server_of(process: psutil.Process) -> psutil.Process:
    """The one that forks for it."""
    (found,) = [one for one in process.children() if forks.__file__ in one.cmdline()]
    return found


def place_of(server: psutil.Process) -> Path:
    (listener,) = [one for one in server.net_connections("unix") if "winnow-forks" in one.laddr]
    return Path(listener.laddr).parent


def assert_gone(pids: list[int], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def by_value(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers do not find the tests; and which test runs is no part of what they should have alike."""
    import ray

    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_forked_worker_is_as_one_that_starts_by_itself() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))  # which Ray raises when it starts a cluster
    with session.forked([LOADED]), session.connected():
        server = server_of(psutil.Process())
        forked, place = workers(6), place_of(server)
        server.kill()
        server.wait()
        (later,) = workers(1)
    assert_gone([worker["pid"] for worker in forked])
    assert not place.exists()
    with session.connected():
        (by_itself,) = workers(1)
    assert by_itself["alike"]["open files"][0] > 1024
    assert {worker["parent"] for worker in forked} == {server.pid}
    assert all(worker["loaded"] == {LOADED} for worker in forked)
    for drawn in zip(*(worker["drawn"] for worker in forked), strict=True):
        assert len(set(drawn)) == len(forked), "a fork goes on from its parent's random numbers"
    assert not later["loaded"], "none was there to fork from; the worker came by itself"
    for worker in (*forked, later):
        assert worker["alike"] == by_itself["alike"]


def test_what_a_sweep_on_cpus_preloads_is_forked_with_the_threads_that_ray_gave(
    definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> tuple[int, bool, int]:
        session.use_what_ray_gave()
        torch = sys.modules["torch"]
        return os.getppid(), torch.cuda.is_available(), torch.get_num_threads()

    import ray

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a user's word, which Ray lets stand
    wanted, by_user = ray.remote(told), ray.remote(told).options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "3,2"}})
    both = [loading.parse(definition(training={"backend": kind}), "test") for kind in ("packed", "solo")]
    preload = dict.fromkeys(module for one in both for module in run._preload(one))
    assert {LOADED, "trainables.engine", "trainables.solo", "trainables.merge"} == {*preload}
    with session.forked([*preload]), session.connected():
        tasks = [wanted.options(num_cpus=2).remote(), wanted.options(num_cpus=1).remote(), by_user.remote()]
        server = server_of(psutil.Process()).pid
        assert ray.get(tasks) == [(server, False, threads) for threads in (2, 1, 3)]


def test_a_fork_has_the_gpu_that_ray_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray looks at its import which are to be seen, and forks go by what it found then."""

    def told() -> tuple[int, list[Any], str]:
        session.use_what_ray_gave()
        return os.getppid(), ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    import ray

    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    with session.forked([LOADED]), session.connected():
        server = server_of(psutil.Process()).pid
        assert ray.get(ray.remote(num_gpus=1)(told).remote()) == (server, [0], "0")
        assert ray.get(ray.remote(num_gpus=0)(told).remote()) == (server, [], "")


def test_no_process_that_has_torch_forks_workers_with_gpus(definition) -> None:
    """CUDA does not survive it where torch, or what comes with it, has looked for a GPU."""
    on_gpus = loading.parse(definition(resources={"gpus_per_trial": 1}), "test")
    assert run._preload(on_gpus) == [LOADED]  # which has none of it, says the first test here


@pytest.mark.parametrize("killed", ["driver", "raylet"])
def test_they_end_with_what_they_work_for(killed: str) -> None:
    starts = (
        "import sys; sys.path += sys.argv[1:]; import ray, psutil, test_forks; from cluster import session\n"
        "ray.cloudpickle.register_pickle_by_value(test_forks)\n"
        "with session.forked(['ray']), session.connected():\n"
        "    kept = [ray.remote(num_cpus=0)(test_forks.Worker).remote() for _ in range(2)]\n"
        "    print(*(told['pid'] for told in ray.get([one.seen.remote() for one in kept])), flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", starts, str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        own = psutil.Process(driver.pid)
        server, family = server_of(own), own.children()
        programs = {Path(word).name for one in family for word in one.cmdline() if word.endswith(".py")}
        assert programs == {"forks.py"}, "processes that only autoscalers, dashboards and terminals ask"
        place = place_of(server)
        assert {psutil.Process(pid).ppid() for pid in pids} == {server.pid}
        if killed == "driver":
            driver.send_signal(signal.SIGKILL)
        else:
            next(one for one in family if one.name() == "raylet").kill()
            driver.communicate("\n", timeout=60)
    assert_gone([*pids, server.pid])
    assert not place.exists()
    assert_gone([one.pid for one in family], within_s=120)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import ray; ray.UniqueID.from_random()", "what has been imported drew from Ray's generator of ids"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    ],
)
def test_nothing_is_forked_that_shares_its_ids_or_lacks_modules(source: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "imported.py").write_text(source)
    with socket.socket(socket.AF_UNIX) as listener:
        path = json.dumps([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, forks.__file__, "--serve", str(listener.fileno()), path, "imported"],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert why in done.stderr
