"""What a sweep would do, before it does it: counts that follow from the definition and the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sweeps.definition import SweepDefinition

if TYPE_CHECKING:
    from trainables.capacity import MemoryModel


def plan(
    definition: SweepDefinition,
    train_examples: int,
    trained_tokens: int,
    memory: MemoryModel | None = None,
    memory_bytes: float | None = None,
    obstacle: str | None = None,
) -> dict[str, Any]:
    """Steps, rungs and upper bounds, on the step axis that all trials share.

    Args:
        train_examples: in the training split.
        trained_tokens: labelled tokens in one epoch of it.
        memory: of a packed engine, where it could be measured, and the bytes that the engine may use.
        obstacle: why trials cannot share this base, where an engine has found that out.
    """
    from trainables.contract import steps_per_epoch

    search, scheduler = definition.search, definition.scheduler
    an_epoch = steps_per_epoch(train_examples, definition.training.effective_batch)
    longest = round(definition.longest_trial_epochs * an_epoch)
    grace = scheduler.grace_period * an_epoch
    rungs = _rungs(grace, longest, scheduler.reduction_factor) if definition.stops_early else []
    return {
        "trials": search.num_samples,
        **_backend(definition, obstacle),
        **(_memory(definition, memory, memory_bytes) if memory and memory_bytes else {}),
        "train_examples": train_examples,
        "steps_per_epoch": an_epoch,
        "longest_trial_steps": longest,
        "rungs": rungs,
        "expected_steps": round(_expected_steps(definition, an_epoch, rungs)),
        "most_steps": longest * search.num_samples,
        "most_trained_tokens": round(trained_tokens * definition.longest_trial_epochs) * search.num_samples,
    }


def _backend(definition: SweepDefinition, obstacle: str | None) -> dict[str, Any]:
    """Who trains, on what, and where trials could have shared a base but do not, why."""
    resources = definition.resources
    if definition.packs and not obstacle:
        return {
            "backend": "packed",
            "engines": resources.engines,
            "slots_per_engine": definition.slots_per_engine,
            "resources_per_engine": resources.engine_as_ray(),
        }
    asked = definition.training.backend == "solo"
    reason = {} if asked else {"solo_because": obstacle or definition.packing_obstacle}
    return {"backend": "solo", "resources_per_trial": resources.as_ray()} | reason


def _memory(definition: SweepDefinition, model: MemoryModel, limit: float) -> dict[str, Any]:
    """What an engine takes, and how many slots its device holds."""
    held = model.slots(limit)
    slots = max(1, min(definition.slots_per_engine, held))
    return {
        "slots_per_engine": slots,
        "slots_that_fit": held,
        "engine_bytes": model.needed(slots),
        "engine_bytes_limit": round(limit),
        "base_bytes": model.base,
        "slot_bytes": model.slot,
        "activation_bytes_per_slot": round(model.activations),
        "dequantised_bytes": model.dequantised,
        "keeps_dequantised": model.keeps_dequantised(slots, limit),
        "most_tokens_a_step": slots * model.batch_tokens,
    }


def _expected_steps(definition: SweepDefinition, an_epoch: int, rungs: list[float]) -> float:
    """Of all trials together, if each rung keeps exactly 1 of ``reduction_factor`` and every trial has mean length."""
    searched = definition.search.space.get("num_train_epochs")
    epochs = searched.extremes() if searched else (definition.training.num_train_epochs,)
    mean = an_epoch * sum(float(value) for value in epochs) / len(epochs)
    kept, before, steps = 1.0, 0.0, 0.0
    for rung in [*rungs, mean]:
        steps += kept * max(0.0, min(rung, mean) - before)
        kept, before = kept / definition.scheduler.reduction_factor, min(rung, mean)
    return definition.search.num_samples * steps


def _rungs(first: float, longest: float, factor: float) -> list[float]:
    rungs = []
    while first <= longest:
        rungs.append(round(first, 2))
        first *= factor
    return rungs
