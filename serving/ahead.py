"""An engine's core on a CPU, forked from a process that imports vLLM while its replica does too, on another core.

By itself vLLM spawns the core there: a new process, which imports all of it again once the replica is done. Python's
forkserver is a process that has done nothing else yet, so that it may be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

WANTED = "WINNOW_FORKS_ENGINE"
"""In a replica's environment. Not with GPUs: a core there starts workers in ways that were never tried forked."""
LOADED = ("vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker")


def begin() -> None:
    """Have the forkserver begin to import, where it is wanted."""
    if WANTED in os.environ:
        multiprocessing.set_forkserver_preload(list(LOADED))
        forkserver.ensure_running()


@contextmanager
def forked() -> Iterator[None]:
    """In this block vLLM forks an engine's core, where that is wanted and this vLLM is one for CPUs.

    Raises:
        RuntimeError: the process to fork from has ended.
    """
    if not _fits():
        yield
        return
    from vllm.v1.engine import utils

    before = utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("the process to fork an engine's core from has ended; see its replica's log") from error
    finally:
        utils.get_mp_context = before
        _tidy()


def _fits() -> bool:
    """What a core loads for a CPU replaces parts of torch that one for GPUs needs, and a node may have them unasked."""
    if WANTED not in os.environ:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _tidy() -> None:
    """One core is all that is forked, and nothing that ends as replicas do takes the forkserver's socket away."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]  # tells nobody where it listens
    if address := server._forkserver_address:
        shutil.rmtree(Path(address).parent, ignore_errors=True)
