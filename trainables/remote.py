"""Puts work of this package on the cluster: each call one Ray task in a fresh process, with its resources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


def submit(function: Callable[..., Any], resources: dict[str, float], *args: Any) -> ray.ObjectRef:
    """Start ``function(*args)`` on a node with ``resources`` free. The process ends with it, and frees its device."""
    options: dict[str, Any] = {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0)}
    return ray.remote(max_calls=1, max_retries=2, **options)(function).remote(*args)


def wait(*references: ray.ObjectRef) -> list[Any]:
    """The results, in order.

    Raises:
        Exception: what the first failed function raised, as itself.
    """
    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
