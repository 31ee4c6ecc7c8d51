"""lm-evaluation-harness on what is there already: a registered version, or an endpoint that is being served."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError

from cluster.settings import one_line
from serving import registry
from trainables.spec import BaseModelSpec, HarnessSuite

_BATCH = 16


def run(target: str, model: str | None, **suite: Any) -> dict[str, float]:
    """``TASK.METRIC`` of every task, on this machine.

    Args:
        target: ``MODEL[@VERSION]``, or the address of an OpenAI-compatible endpoint, with its ``/v1``.
        model: what to ask an endpoint for.
        suite: the fields of a ``HarnessSuite``.

    Raises:
        ValueError: the target, a task or a setting is not what it should be.
    """
    try:
        checked = HarnessSuite(kind="lm_eval", **suite)
    except ValidationError as error:
        raise ValueError(f"harness: {one_line(error)}") from None
    from trainables import harness

    if not target.startswith(("http://", "https://")):
        version = registry.find(target)
        harness.check(checked, "harness")
        spec = BaseModelSpec.model_validate(_without_fingerprint(version.record["base_model"]))
        return harness.score(checked, harness.Model(spec, merged=str(version.path)), _BATCH)
    if not model:
        raise ValueError("--model: required for an endpoint; name the model to ask it for")
    harness.check(checked, "harness")
    return harness.score_endpoint(checked, target, model, os.environ.get("OPENAI_API_KEY", "unused"))


def _without_fingerprint(base_model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in base_model.items() if name != "fingerprint"}
