"""Ray nodes that Winnow starts end with all that they started."""

from __future__ import annotations

import os
import subprocess
import time

import psutil

from cluster.session import Head


def test_a_node_takes_along_what_has_lost_its_parent() -> None:
    """As an engine does whose replica ends while it is born; a shell in a session of its own stands for the node."""
    shell = subprocess.Popen(
        ["bash", "-c", "bash -c 'sleep 300 & echo $!'; exec sleep 300"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert shell.stdout
    orphan = psutil.Process(int(shell.stdout.readline()))
    deadline = time.monotonic() + 10
    while orphan.parent() is not None and orphan.ppid() != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphan not in psutil.Process(shell.pid).children(recursive=True)
    assert os.getsid(orphan.pid) == shell.pid
    Head("127.0.0.1:1", shell.pid, psutil.Process(shell.pid).create_time()).stop(timeout_s=0.5)
    shell.wait(timeout=5)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
