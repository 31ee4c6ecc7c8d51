"""Work on a real Ray cluster: whose process the next task may have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from cluster import session
from trainables import remote


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with session.connected():
        yield


def ran_in(leaves_nothing: bool) -> int:
    return remote.wait(remote.submit(os.getpid, {"CPU": 1}, leaves_nothing=leaves_nothing))[0]


def ends(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while (alive := psutil.pid_exists(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


def test_a_process_ends_with_its_task_unless_that_leaves_nothing() -> None:
    assert ends(ran_in(leaves_nothing=False), within_s=30)
    assert not ends(ran_in(leaves_nothing=True), within_s=0.5)


def test_a_task_without_a_gpu_finds_none_of_its_nodes() -> None:
    assert remote.wait(remote.submit(os.getenv, {"CPU": 1}, "CUDA_VISIBLE_DEVICES")) == [""]


def test_where_there_are_gpus_it_ends_even_so(monkeypatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    assert ends(ran_in(leaves_nothing=True), within_s=30)
