"""Submitting a sweep to a Ray cluster as a job, and following it to its own exit status."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

from cluster import paths, session

_POLL_S = 1.0


def submit(definition: Path, address: str, wait: bool) -> tuple[int, str]:
    """Send the working directory and run the definition there.

    Args:
        address: of the cluster's dashboard, ``http://host:8265``.
        wait: stream the job's log to standard error until it ends.

    Returns:
        Exit status (the job's own, 0 without ``wait``) and the last line of its log, or the job's id without ``wait``.

    Raises:
        ValueError: the definition lies outside the working directory, or nothing answers at ``address``.
    """
    session.quieten()
    from ray.job_submission import JobSubmissionClient

    try:
        relative = definition.absolute().relative_to(Path.cwd())
    except ValueError:
        raise ValueError(f"{definition}: must lie inside the working directory, which the job is sent") from None
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--address: nothing answers as a Ray dashboard at {address!r}: {_first(error)}") from None
    job = client.submit_job(
        entrypoint=f"python -m sweeps run {shlex.quote(str(relative))} --json",
        runtime_env={"working_dir": ".", "env_vars": {"WINNOW_HOME": str(paths.home())}},
    )
    print(f"job: {job} (stop it with: ray job stop {job} --address {address})", file=sys.stderr, flush=True)
    if not wait:
        return 0, job
    last = asyncio.run(_stream(client, job))
    status = client.get_job_info(job)
    return status.driver_exit_code if status.driver_exit_code is not None else 1, last


async def _stream(client, job: str) -> str:
    """Copy the job's log to standard error as it grows; returns its last line that is not empty."""
    text = ""
    async for piece in client.tail_job_logs(job):
        print(piece, end="", file=sys.stderr, flush=True)
        text = (text + piece)[-200_000:]
    while client.get_job_info(job).status.value in {"PENDING", "RUNNING"}:
        await asyncio.sleep(_POLL_S)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
