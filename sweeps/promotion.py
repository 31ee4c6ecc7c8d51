"""From a trial to a registered version: scored, gated, merged, checked against its adapter, registered."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import files, paths
from serving import registry
from serving.registry import ModelVersion
from sweeps import gate
from sweeps.definition import SweepDefinition
from sweeps.gate import Gate
from trainables.data.snapshot import Snapshot

Log = Callable[[str], None]
_PACKAGES = ("ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "optuna")


@dataclass(frozen=True)
class Promotion:
    """What promoting a trial came to. ``version`` is None where the gate rejected it."""

    scores: dict[str, dict[str, float]]
    gate: Gate
    version: ModelVersion | None


def promote(definition: SweepDefinition, run_id: str, trial: dict[str, Any], data: Snapshot, log: Log) -> Promotion:
    """Hold a trial of a run against the base and register it if the gate accepts; ``production`` then points to it."""
    scores = score_contestants(definition, run_id, trial["trial_id"], data, log)
    verdict = gate.judge(definition.gate, scores["base"], scores["winner"])
    if verdict.verdict == "REJECT":
        return Promotion(scores, verdict, None)
    with registry.staging(definition.name) as staged:
        log("merge: into the 16-bit base, then the same prompts to adapter and merged model")
        parity = _merge(definition, paths.adapter_dir(run_id, trial["trial_id"]), str(staged), data)
        verdict = gate.judge_merge(definition.gate, verdict, parity["loss_difference"], parity["agreement"])
        if verdict.verdict == "REJECT":
            return Promotion(scores, verdict, None)
        record = _record(definition, run_id, trial, data, scores, verdict) | {"parity": parity}
        version = registry.register(definition.name, staged, record)
    registry.set_alias(definition.name, registry.PRODUCTION, version.version, f"run {run_id}, {trial['trial_id']}")
    return Promotion(scores, verdict, version)


def score_contestants(
    definition: SweepDefinition, run_id: str, trial_id: str, data: Snapshot, log: Log
) -> dict[str, dict[str, float]]:
    """Base and winner on the test split and the general set, side by side on the cluster; answers go to the run."""
    from trainables import remote, scoring

    log(f"scoring: base and {trial_id} on {data.count('test')} test and {data.count('general')} general prompts")
    common = (definition.base_model, str(data.directory), definition.evaluation)
    wanted = definition.resources.as_ray()
    contestants = {"base": None, "winner": str(paths.adapter_dir(run_id, trial_id))}
    tasks = [remote.submit(scoring.score, wanted, *common, adapter) for adapter in contestants.values()]
    results = dict(zip(contestants, remote.wait(*tasks), strict=True))
    for name, scores in results.items():
        files.write_json(paths.scores_file(run_id, name), scores.as_dict())
    return {name: scores.metrics for name, scores in results.items()}


def _merge(definition: SweepDefinition, adapter: Any, target: str, data: Snapshot) -> dict[str, Any]:
    """Merge into ``target``, then the parity of what was written with the adapter."""
    from trainables import merge, remote

    wanted, spec = definition.resources.as_ray(), definition.base_model
    task = remote.submit(
        merge.merge_and_check, wanted, spec, str(adapter), target, str(data.directory), definition.evaluation
    )
    return remote.wait(task)[0].as_dict()


def _record(
    definition: SweepDefinition, run_id: str, trial: dict[str, Any], data: Snapshot, scores: Any, verdict: Gate
) -> dict[str, Any]:
    """What ``record.json`` says of a version: where it came from, and how it was proven."""
    from trainables import base

    return {
        "run_id": run_id,
        "trial_id": trial["trial_id"],
        "base_model": definition.base_model.model_dump(mode="json")
        | {"fingerprint": base.fingerprint(definition.base_model)},
        "dataset_hash": data.dataset_hash,
        "params": trial["params"],
        "training": definition.trial_training(trial["params"]).model_dump(mode="json"),
        "scores": scores,
        "gate": verdict.as_result(),
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
