"""Puts work of this package on the cluster: each call one Ray task, with its resources."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import ray

from cluster import session


def submit(
    function: Callable[..., Any], resources: dict[str, float], *args: Any, leaves_nothing: bool = False
) -> ray.ObjectRef:
    """Start ``function(*args)`` on a node with ``resources`` free.

    Args:
        leaves_nothing: the next task may have its process, and what that has imported. Otherwise the process ends with
            it, and so it does on a cluster with GPUs: that is how memory there is freed.
    """
    options: dict[str, Any] = {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0)}
    stays = leaves_nothing and not ray.cluster_resources().get("GPU")
    calls = 0 if stays else 1  # 0 is Ray's word for any number
    return ray.remote(max_calls=calls, max_retries=2, **options)(_and_let_go).remote(function, *args)


def _and_let_go(function: Callable[..., Any], *args: Any) -> Any:
    """A 4-bit layer and its weight hold each other: a process that waits would keep the whole model."""
    session.use_what_ray_gave()
    try:
        return function(*args)
    finally:
        gc.collect()


def wait(*references: ray.ObjectRef) -> list[Any]:
    """The results, in order.

    Raises:
        Exception: what the first failed function raised, as itself.
    """
    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
