"""Who is held against whom: base, few-shot base, winner, production; what each answers, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from cluster import files, paths
from serving import registry
from serving.registry import ModelVersion
from sweeps import reviews
from sweeps.definition import SweepDefinition
from sweeps.gate import Opinions
from trainables.data.snapshot import Snapshot
from trainables.metrics import Scores

Log = Callable[[str], None]
NAMES = ("base", "few_shot", "winner", "production")


def score(definition: SweepDefinition, run_id: str, trial_id: str, data: Snapshot, log: Log) -> dict[str, Scores]:
    """Every contestant on the test split, the general set and the suites, side by side on the cluster.

    Their answers go to the run.
    """
    from trainables import remote, scoring
    from trainables.data import suites

    asked = suites.read(definition.evaluation, definition.data.task_prefixes)
    evaluation = definition.evaluation
    if evaluation.generation == "auto" and 0 < definition.resources.gpus_per_trial < 1:
        evaluation = evaluation.model_copy(update={"generation": "transformers"})  # vLLM wants a whole GPU
    common = (definition.base_model, str(data.directory), evaluation, asked)
    without_vllm = {"auto": definition.base_model.quantization == "nf4", "transformers": True, "vllm": False}
    start = partial(remote.submit, leaves_nothing=without_vllm[evaluation.generation])
    wanted = definition.resources.as_ray()
    tasks = {
        "base": start(scoring.score_base, wanted, *common),
        "winner": start(scoring.score_adapter, wanted, *common, str(paths.adapter_dir(run_id, trial_id))),
    }
    if production := _production(definition.name, run_id, trial_id):
        tasks["production"] = start(scoring.score_merged, wanted, *common, str(production.path))
    sets = [f"{data.answers('test')} test", f"{data.answers('general')} general"]
    sets += [f"{len(suite.conversations)} {suite.name}" for suite in asked]
    against = f" and production {production.version}" if production else ""
    log(f"scoring: base, {trial_id}{against} on {', '.join(sets)} prompts")
    found = dict(zip(tasks, remote.wait(*tasks.values()), strict=True))
    scored: dict[str, Scores] = found.pop("base") | found
    for stale in set(NAMES) - set(scored):
        paths.scores_file(run_id, stale).unlink(missing_ok=True)
    _keep(run_id, scored)
    return scored


def _keep(run_id: str, scored: dict[str, Scores]) -> None:
    for name, scores in scored.items():
        files.write_json(paths.scores_file(run_id, name), scores.as_dict())


def judged(definition: SweepDefinition, run_id: str, scored: dict[str, Scores], log: Log) -> dict[str, Scores]:
    """The contestants with the judge's grades, where the definition has one."""
    if definition.evaluation.judge is None:
        paths.judge_file(run_id).unlink(missing_ok=True)
        return scored
    from sweeps.judge import verdicts

    judgement = verdicts.judge(definition.evaluation, scored, log)
    files.write_json(paths.judge_file(run_id), judgement.as_dict())
    _keep(run_id, judgement.scored)
    return judgement.scored


def run_harness(
    definition: SweepDefinition, run_id: str, trial_id: str, merged: str, scored: dict[str, Scores], log: Log
) -> dict[str, dict[str, float]]:
    """lm-evaluation-harness on the base, on what is to be registered, and on production: all metrics, with its own."""
    from trainables import harness, remote
    from trainables.generation import Model

    models = {"base": Model(definition.base_model), "winner": Model(definition.base_model, merged=merged)}
    if production := _production(definition.name, run_id, trial_id):
        models["production"] = Model(definition.base_model, merged=str(production.path))
    wanted, batch_size = definition.resources.as_ray(), definition.evaluation.batch_size
    metrics = {name: dict(scores.metrics) for name, scores in scored.items()}
    for name, suite in definition.evaluation.harness.items():
        log(f"lm_eval: {', '.join(suite.tasks)} on {', '.join(models)}")
        suite = harness.absolute(suite)
        tasks = [remote.submit(harness.score, wanted, suite, model, batch_size) for model in models.values()]
        for contestant, found in zip(models, remote.wait(*tasks), strict=True):
            metrics[contestant] |= {f"{name}.{metric}": value for metric, value in found.items()}
    if definition.evaluation.harness:
        _keep(run_id, {name: replace(scores, metrics=metrics[name]) for name, scores in scored.items()})
    return metrics


def judge_summary(run_id: str) -> dict[str, Any] | None:
    """What the judge did, without every single verdict; None where none was asked."""
    file = paths.judge_file(run_id)
    if not file.exists():
        return None
    return {name: value for name, value in files.read_json(file).items() if name != "verdicts"}


def opinions(run_id: str, scored: dict[str, Scores]) -> Opinions:
    """What judge and people have said of a run's answers, from its files."""
    judged = judge_summary(run_id) or {}
    review = reviews.summary(run_id, scored) or {"reviews": 0, "scores": {}}
    return Opinions(
        judged=judged.get("judged"),
        win_rates={name: found["win_rate"] for name, found in judged.get("pairwise", {}).items()},
        reviews=review["reviews"],
        review_score=review["scores"].get("winner", 0.0),
    )


def are_there(run_id: str) -> bool:
    """Whether ``read`` finds a scored winner, as no run has before its search is done."""
    file = paths.scores_file(run_id, "winner")
    return file.exists() and "sets" in files.read_json(file)  # a Winnow that kept less wrote other files


def read(run_id: str) -> dict[str, Scores]:
    """What ``score`` left of a run.

    Raises:
        ValueError: nothing, for the run was not scored.
    """
    if not are_there(run_id):
        raise ValueError(f"run {run_id!r} has no scored winner; score it with: python -m sweeps promote {run_id}")
    there = {name: paths.scores_file(run_id, name) for name in NAMES}
    return {name: Scores.from_dict(files.read_json(file)) for name, file in there.items() if file.exists()}


def compare(
    definition: SweepDefinition, scored: dict[str, Scores]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, dict[str, float]]]]:
    """Metrics by contestant, and the winner's gains over each of the others with their intervals."""
    from sweeps import comparison

    gains = {
        name: {
            metric: gain.as_dict()
            for metric, gain in comparison.gains(scored["winner"], other, definition.evaluation).items()
        }
        for name, other in scored.items()
        if name != "winner"
    }
    return {name: scores.metrics for name, scores in scored.items()}, gains


def _production(model: str, run_id: str, trial_id: str) -> ModelVersion | None:
    """The version to beat; none where there is no production, or where it is this very trial."""
    if registry.PRODUCTION not in registry.aliases(model):
        return None
    version = registry.find(model)
    same = (version.record["run_id"], version.record["trial_id"]) == (run_id, trial_id)
    return None if same else version
