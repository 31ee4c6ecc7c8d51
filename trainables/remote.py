"""Puts work of this package on the cluster: each call one Ray task, with its resources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


def submit(
    function: Callable[..., Any], resources: dict[str, float], *args: Any, leaves_nothing: bool = False
) -> ray.ObjectRef:
    """Start ``function(*args)`` on a node with ``resources`` free.

    Args:
        leaves_nothing: the next task may have its process, and what that has imported. Otherwise the process ends with
            it, and so does one that has a GPU: that is how memory there is freed.
    """
    cpus, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
    calls = 0 if leaves_nothing and not gpus else 1  # 0 is Ray's word for any number
    return ray.remote(max_calls=calls, max_retries=2, num_cpus=cpus, num_gpus=gpus)(function).remote(*args)


def wait(*references: ray.ObjectRef) -> list[Any]:
    """The results, in order.

    Raises:
        Exception: what the first failed function raised, as itself.
    """
    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
