"""An engine's core on a CPU, forked from a process that imports vLLM while its replica does too, on another core.

vLLM starts its core as a new process, which imports all of it again once the replica is done: in a Ray actor it may not
fork. From a process that has done nothing else yet it may, and that is what Python's forkserver is.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

WANTED = "WINNOW_FORKS_ENGINE"
"""In a replica's environment. Not with GPUs: a core there starts workers in ways that were never tried forked."""
_LOADED = ("vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker")


def begin() -> None:
    """Have the forkserver begin to import, where it is wanted."""
    if WANTED in os.environ:
        multiprocessing.set_forkserver_preload(list(_LOADED))
        forkserver.ensure_running()


@contextmanager
def forked() -> Iterator[None]:
    """In this block vLLM forks an engine's core, where that is wanted."""
    if WANTED not in os.environ:
        yield
        return
    from vllm.v1.engine import utils

    before = utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
    try:
        yield
    finally:
        utils.get_mp_context = before
