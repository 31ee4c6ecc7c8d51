"""From a trial to a registered version: scored, gated, merged, checked against its adapter, registered."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster import paths
from serving import registry
from serving.registry import ModelVersion
from sweeps import contestants, gate, reviews
from sweeps.definition import SweepDefinition
from sweeps.gate import Gate
from trainables.data.snapshot import Snapshot

Log = Callable[[str], None]
_PACKAGES = ("ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "optuna")


@dataclass(frozen=True)
class Promotion:
    """What promoting a trial came to. ``version`` is None where the gate rejected it."""

    scores: dict[str, dict[str, float]]
    gains: dict[str, dict[str, dict[str, float]]]
    gate: Gate
    judge: dict[str, Any] | None = None
    review: dict[str, Any] | None = None
    version: ModelVersion | None = None


def promote(definition: SweepDefinition, run_id: str, trial: dict[str, Any], data: Snapshot, log: Log) -> Promotion:
    """Hold a trial of a run against the others and register it if the gate accepts; it is ``production`` then."""
    scored = contestants.score(definition, run_id, trial["trial_id"], data, log)
    scored = contestants.judged(definition, run_id, scored, log)
    scores, gains = contestants.compare(definition, scored)
    verdict = gate.judge(definition.gate, scores, gains, contestants.opinions(run_id, scored))
    found = Promotion(scores, gains, verdict, contestants.judge_summary(run_id), reviews.summary(run_id, scored))
    if verdict.verdict == "REJECT":
        return found
    with registry.staging(definition.name) as staged:
        log("merge: into the 16-bit base, then the same prompts to adapter and merged model")
        parity = _merge(definition, paths.adapter_dir(run_id, trial["trial_id"]), str(staged), data)
        scores = contestants.run_harness(definition, run_id, trial["trial_id"], str(staged), scored, log)
        verdict = gate.judge_merge(definition.gate, verdict, scores, parity["loss_difference"], parity["agreement"])
        found = replace(found, scores=scores, gate=verdict)
        if verdict.verdict == "REJECT":
            return found
        proof = {"scores": scores, "gains": gains, "gate": verdict.as_result(), "parity": parity}
        version = registry.register(definition.name, staged, _record(definition, run_id, trial, data) | proof)
    registry.set_alias(definition.name, registry.PRODUCTION, version.version, f"run {run_id}, {trial['trial_id']}")
    return replace(found, version=version)


def judge_again(run_id: str, definition: SweepDefinition) -> Gate:
    """A scored run's verdict under the limits of ``definition``, from its files: nothing is trained or asked again.

    Raises:
        ValueError: the run was not scored.
    """
    from sweeps import results

    scored = contestants.read(run_id)
    scores, gains = contestants.compare(definition, scored)
    verdict = gate.judge(definition.gate, scores, gains, contestants.opinions(run_id, scored))
    before = {check["name"]: check["value"] for check in (results.read(run_id)["gate"] or {"checks": []})["checks"]}
    if "merge_agreement" in before:
        difference, agreement = before["merge_loss_difference"], before["merge_agreement"]
        verdict = gate.judge_merge(definition.gate, verdict, scores, difference, agreement)
    return verdict


def _merge(definition: SweepDefinition, adapter: Any, target: str, data: Snapshot) -> dict[str, Any]:
    """Merge into ``target``, then the parity of what was written with the adapter."""
    from trainables import merge, remote

    wanted = definition.resources.as_ray()
    arguments = definition.base_model, str(adapter), target, str(data.directory), definition.evaluation
    task = remote.submit(merge.merge_and_check, wanted, *arguments, leaves_nothing=True)
    return remote.wait(task)[0].as_dict()


def _record(definition: SweepDefinition, run_id: str, trial: dict[str, Any], data: Snapshot) -> dict[str, Any]:
    """What ``record.json`` says of where a version came from."""
    from trainables import base

    return {
        "run_id": run_id,
        "trial_id": trial["trial_id"],
        "base_model": definition.base_model.model_dump(mode="json")
        | {"fingerprint": base.fingerprint(definition.base_model)},
        "dataset_hash": data.dataset_hash,
        "params": trial["params"],
        "training": definition.trial_training(trial["params"]).model_dump(mode="json"),
        "serving": definition.serving.model_dump(mode="json"),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The working directory's commit; None outside a checkout, as in a job's uploaded directory."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
