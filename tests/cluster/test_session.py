"""Ray nodes that Winnow starts end with all that they started, and what has left Ray stays away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.session import Head, of_session


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


def test_a_node_that_is_interrupted_while_it_starts_ends(tmp_path: Path) -> None:
    starts = (  # of a suite in a shell's background it would have the signal ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from cluster import session\n"
        f"try: session.start_head(Path({str(tmp_path / 'log')!r}))\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    starting = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True)
    deadline, nodes = time.monotonic() + 60, list[psutil.Process]()
    while not nodes and time.monotonic() < deadline:
        time.sleep(0.05)
        for one in psutil.Process(starting.pid).children():
            with suppress(ProcessLookupError):
                nodes += [one] if os.getsid(one.pid) == one.pid else []
    starting.send_signal(signal.SIGINT)
    told, _ = starting.communicate(timeout=60)
    assert told == "interrupted\n"
    assert nodes
    assert not [one for one in of_session(nodes[0].pid) if one.status() != psutil.STATUS_ZOMBIE]


def test_one_that_is_interrupted_before_it_is_known_ends_too(tmp_path: Path) -> None:
    starts = (
        "import subprocess, types; from pathlib import Path; from cluster import session\n"
        "def interrupted(*args, **kwargs): print(subprocess.Popen(*args, **kwargs).pid); raise KeyboardInterrupt\n"
        "session.subprocess = types.SimpleNamespace(**vars(subprocess) | {'Popen': interrupted})\n"
        f"try: session.start_head(Path({str(tmp_path / 'log')!r}))\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    done = subprocess.run([sys.executable, "-c", starts], capture_output=True, text=True, timeout=120)
    node, told = done.stdout.split()
    assert told == "interrupted", done.stderr
    assert not [one for one in of_session(int(node)) if one.status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_has_left_does_not_come_back() -> None:
    """Serve's handles poll from a thread that nothing ends; by default whatever asks Ray after that connects again,
    or starts a cluster that nobody knows of."""
    asks = (
        "from cluster import session; session.quieten(); import ray\n"
        "try: ray.get_actor('nobody')\n"
        "except Exception: print(ray.is_initialized())"
    )
    told = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout == "False\n"
