"""What a sweep would do, before it does it: counts that follow from the definition and the data."""

from __future__ import annotations

from typing import Any

from sweeps.definition import SweepDefinition


def plan(definition: SweepDefinition, train_examples: int, trained_tokens: int) -> dict[str, Any]:
    """Steps, rungs and upper bounds, on the step axis that all trials share.

    Args:
        train_examples: in the training split.
        trained_tokens: labelled tokens in one epoch of it.
    """
    from trainables.contract import steps_per_epoch

    search, scheduler = definition.search, definition.scheduler
    an_epoch = steps_per_epoch(train_examples, definition.training.effective_batch)
    longest = round(definition.longest_trial_epochs * an_epoch)
    grace = scheduler.grace_period * an_epoch
    return {
        "trials": search.num_samples,
        "concurrent_trials": search.max_concurrent_trials,
        **_backend(definition),
        "train_examples": train_examples,
        "steps_per_epoch": an_epoch,
        "longest_trial_steps": longest,
        "rungs": _rungs(grace, longest, scheduler.reduction_factor) if scheduler.type == "asha" else [],
        "most_steps": longest * search.num_samples,
        "most_trained_tokens": round(trained_tokens * definition.longest_trial_epochs) * search.num_samples,
    }


def _backend(definition: SweepDefinition) -> dict[str, Any]:
    """Who trains, on what, and where trials could have shared a base but do not, why."""
    resources = definition.resources
    if definition.packs:
        return {
            "backend": "packed",
            "engines": resources.engines,
            "slots_per_engine": definition.slots_per_engine,
            "resources_per_engine": resources.engine_as_ray(),
        }
    asked = definition.training.backend == "solo"
    reason = {} if asked else {"solo_because": definition.packing_obstacle}
    return {"backend": "solo", "resources_per_trial": resources.as_ray()} | reason


def _rungs(first: float, longest: float, factor: float) -> list[float]:
    rungs = []
    while first <= longest:
        rungs.append(round(first, 2))
        first *= factor
    return rungs
