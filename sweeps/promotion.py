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
from trainables.metrics import Scores

Log = Callable[[str], None]
CONTESTANTS = ("base", "few_shot", "winner", "production")
_PACKAGES = ("ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "optuna")


@dataclass(frozen=True)
class Promotion:
    """What promoting a trial came to. ``version`` is None where the gate rejected it."""

    scores: dict[str, dict[str, float]]
    gains: dict[str, dict[str, dict[str, float]]]
    gate: Gate
    version: ModelVersion | None


def promote(definition: SweepDefinition, run_id: str, trial: dict[str, Any], data: Snapshot, log: Log) -> Promotion:
    """Hold a trial of a run against the others and register it if the gate accepts; it is ``production`` then."""
    scored = score_contestants(definition, run_id, trial["trial_id"], data, log)
    scores, gains = compare(definition, scored)
    verdict = gate.judge(definition.gate, scores, gains)
    if verdict.verdict == "REJECT":
        return Promotion(scores, gains, verdict, None)
    with registry.staging(definition.name) as staged:
        log("merge: into the 16-bit base, then the same prompts to adapter and merged model")
        parity = _merge(definition, paths.adapter_dir(run_id, trial["trial_id"]), str(staged), data)
        verdict = gate.judge_merge(definition.gate, verdict, parity["loss_difference"], parity["agreement"])
        if verdict.verdict == "REJECT":
            return Promotion(scores, gains, verdict, None)
        proof = {"scores": scores, "gains": gains, "gate": verdict.as_result(), "parity": parity}
        version = registry.register(definition.name, staged, _record(definition, run_id, trial, data) | proof)
    registry.set_alias(definition.name, registry.PRODUCTION, version.version, f"run {run_id}, {trial['trial_id']}")
    return Promotion(scores, gains, verdict, version)


def score_contestants(
    definition: SweepDefinition, run_id: str, trial_id: str, data: Snapshot, log: Log
) -> dict[str, Scores]:
    """Every contestant on the test split and the general set, side by side on the cluster; answers go to the run."""
    from trainables import remote, scoring

    common = (definition.base_model, str(data.directory), definition.evaluation)
    wanted = definition.resources.as_ray()
    tasks = {
        "base": remote.submit(scoring.score_base, wanted, *common),
        "winner": remote.submit(scoring.score_adapter, wanted, *common, str(paths.adapter_dir(run_id, trial_id))),
    }
    if production := _production(definition.name, run_id, trial_id):
        tasks["production"] = remote.submit(scoring.score_merged, wanted, *common, str(production.path))
    log(
        f"scoring: base, {trial_id}{f' and production {production.version}' if production else ''} "
        f"on {data.answers('test')} test and {data.answers('general')} general prompts"
    )
    found = dict(zip(tasks, remote.wait(*tasks.values()), strict=True))
    scored: dict[str, Scores] = found.pop("base") | found
    for stale in set(CONTESTANTS) - set(scored):
        paths.scores_file(run_id, stale).unlink(missing_ok=True)
    for name, scores in scored.items():
        files.write_json(paths.scores_file(run_id, name), scores.as_dict())
    return scored


def read_contestants(run_id: str) -> dict[str, Scores]:
    """What ``score_contestants`` left of a run.

    Raises:
        ValueError: nothing, for the run was not scored.
    """
    there = {name: paths.scores_file(run_id, name) for name in CONTESTANTS}
    stored = {name: files.read_json(file) for name, file in there.items() if file.exists()}
    if "kind" not in stored.get("winner", {}):  # not scored, or by a Winnow that kept less
        raise ValueError(f"run {run_id!r} has no scored winner; score it with: python -m sweeps promote {run_id}")
    return {name: Scores.from_dict(scores) for name, scores in stored.items()}


def compare(
    definition: SweepDefinition, scored: dict[str, Scores]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, dict[str, float]]]]:
    """Metrics by contestant, and the winner's gains over each of the others with their intervals."""
    from sweeps import comparison

    winner, spec = scored["winner"], definition.evaluation
    gains: dict[str, dict[str, dict[str, float]]] = {}
    for name, other in scored.items():
        if name != "winner":
            found = comparison.gains(winner.kind, winner.answers, other.answers, spec)
            if general := comparison.general_gain(winner.general_answers, other.general_answers, spec):
                found["general_exact_match"] = general
            gains[name] = {metric: gain.as_dict() for metric, gain in found.items()}
    return {name: scores.metrics for name, scores in scored.items()}, gains


def judge_again(run_id: str, definition: SweepDefinition) -> Gate:
    """A scored run's verdict under the limits of ``definition``, from its files: nothing is trained or asked again.

    Raises:
        ValueError: the run was not scored.
    """
    from sweeps import results

    scored = read_contestants(run_id)
    verdict = gate.judge(definition.gate, *compare(definition, scored))
    before = {check["name"]: check["value"] for check in (results.read(run_id)["gate"] or {"checks": []})["checks"]}
    if "merge_agreement" in before:
        difference, agreement = before["merge_loss_difference"], before["merge_agreement"]
        verdict = gate.judge_merge(definition.gate, verdict, difference, agreement)
    return verdict


def _production(model: str, run_id: str, trial_id: str) -> ModelVersion | None:
    """The version to beat; none where there is no production, or where it is this very trial."""
    if registry.PRODUCTION not in registry.aliases(model):
        return None
    version = registry.find(model)
    same = (version.record["run_id"], version.record["trial_id"]) == (run_id, trial_id)
    return None if same else version


def _merge(definition: SweepDefinition, adapter: Any, target: str, data: Snapshot) -> dict[str, Any]:
    """Merge into ``target``, then the parity of what was written with the adapter."""
    from trainables import merge, remote

    wanted, spec = definition.resources.as_ray(), definition.base_model
    task = remote.submit(
        merge.merge_and_check, wanted, spec, str(adapter), target, str(data.directory), definition.evaluation
    )
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
