"""``python -m sweeps``: from validate and run to gate, review and submit; ``--help`` lists them.

Heavy imports stay inside the commands that need them, so that ``validate`` answers at once.
"""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.command import DONE, INTERRUPTED, REJECTED, guarded, say
from sweeps import loading

if TYPE_CHECKING:
    from sweeps.definition import SweepDefinition
    from trainables.capacity import MemoryModel
    from trainables.data.snapshot import Snapshot


def validate(arguments: argparse.Namespace) -> int:
    definition = loading.load(arguments.definition)
    loading.check_inputs(definition)
    fields = ", ".join(definition.search.space)
    say(f"{arguments.definition}: valid; {definition.search.num_samples} trials over {fields}")
    answer(arguments, {"valid": True, "name": definition.name})
    return DONE


def schema(_: argparse.Namespace) -> int:
    from sweeps.definition import SweepDefinition

    print(json.dumps(SweepDefinition.model_json_schema(), indent=2))
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    definition = loading.load(arguments.definition)
    loading.check_inputs(definition)
    from sweeps import dataset
    from sweeps import plan as plans

    data = dataset.prepared(definition)
    tokens = data.manifest["splits"]["train"]["trained_tokens"]
    memory, limit, obstacle = _probed(definition, data)
    planned = plans.plan(definition, data.count("train"), tokens, memory, limit, obstacle)
    for name, value in planned.items():
        say(f"  {name:25} {value}")
    answer(arguments, planned)
    return DONE


def _probed(definition: SweepDefinition, data: Snapshot) -> tuple[MemoryModel | None, float | None, str | None]:
    """An engine's memory and its limit, measured on this machine, or why its trials cannot share this base after all;
    nothing where they will not, or not on this kind of device.
    """
    from trainables import base

    if not definition.packs:
        return None, None, None
    resources, device = definition.resources, base.device()
    if (device.type == "cuda") != (resources.gpus_per_trial > 0):
        say(f"plan: the sweep runs on another kind of device than this machine's {device.type}: no memory is measured")
        return None, None, None
    from trainables import probe
    from trainables.contract import CannotPack

    say("plan: loading the base to measure what a trial takes")
    try:
        memory, limit = probe.measured(
            definition.base_model,
            data,
            definition.largest_training,
            resources.memory_gib_per_engine,
            resources.engine_as_ray().get("CPU", 1),
            answers=definition.measurement is not None,
        )
    except CannotPack as error:
        definition.check_may_be_solo(str(error))
        return None, None, str(error)
    return memory, limit, None


def data(arguments: argparse.Namespace) -> int:
    definition = loading.load(arguments.definition)
    loading.check_inputs(definition)
    from cluster import paths
    from sweeps import dataset
    from trainables.data.prepare import told

    manifest, made = dataset.examined(definition)
    for finding in manifest["findings"]:
        say(f"  {finding['level']:8} {told(finding)}")
    page = paths.data_page(manifest["dataset_hash"])
    say(f"data: {page}")
    answer(arguments, manifest | {"page": str(page), "snapshot": str(made.directory) if made else None})
    if made is None:
        raise ValueError("data: refused for the errors above; mend them and look again")
    return DONE


def run(arguments: argparse.Namespace) -> int:
    definition = loading.load(arguments.definition)
    loading.check_inputs(definition)
    from sweeps.run import run as run_sweep

    return _finish(arguments, run_sweep(definition))


def resume(arguments: argparse.Namespace) -> int:
    from sweeps.run import run as run_sweep
    from sweeps.run import stored_definition

    definition = stored_definition(arguments.run)
    loading.check_inputs(definition)
    return _finish(arguments, run_sweep(definition, arguments.run))


def status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from sweeps.run import stored_definition
    from sweeps.search import study, table

    definition = stored_definition(arguments.run)
    trials = study.records(study.open_study(arguments.run, definition.search))
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(
        table.trials_table(trials, definition.search.num_samples)
    )
    answer(arguments, {"run_id": arguments.run, "trials": [trial.as_result() for trial in trials]})
    return DONE


def report(arguments: argparse.Namespace) -> int:
    from sweeps.report import write_report

    page = write_report(arguments.run)
    say(f"report: {page}")
    answer(arguments, {"run_id": arguments.run, "report": str(page)})
    return DONE


def promote(arguments: argparse.Namespace) -> int:
    from sweeps.run import promote_trial

    return _finish(arguments, promote_trial(arguments.run, arguments.trial))


def gate(arguments: argparse.Namespace) -> int:
    from sweeps import promotion
    from sweeps.run import stored_definition

    definition = stored_definition(arguments.run)
    if arguments.limits:
        limits = loading.load(arguments.limits)
        definition = definition.model_copy(update={"gate": limits.gate, "evaluation": limits.evaluation})
    verdict = promotion.judge_again(arguments.run, definition).as_result()
    _say_checks(verdict)
    say(f"gate: {verdict['verdict']}")
    answer(arguments, {"run_id": arguments.run, "gate": verdict})
    return DONE if verdict["verdict"] == "ACCEPT" else REJECTED


def review(arguments: argparse.Namespace) -> int:
    from sweeps import contestants, review_page, reviews
    from sweeps.report import write_report
    from sweeps.run import stored_definition

    run_id, who = arguments.run, arguments.reviewer or getpass.getuser()
    if arguments.prompts < 1:
        raise ValueError(f"--prompts: must be at least 1, but got {arguments.prompts}")
    seed = stored_definition(run_id).evaluation.seed
    scored = contestants.read(run_id)

    def keep(sheet: reviews.Sheet, scores: dict[reviews.Label, int], better: str) -> None:
        reviews.keep(run_id, sheet, scores, better, who)

    try:
        if left := reviews.sheets(run_id, scored, arguments.prompts, seed):
            review_page.serve(left, keep, arguments.port, say)
    except KeyboardInterrupt:
        say(f"interrupted; what was scored is kept; go on with: python -m sweeps review {run_id}")
        return INTERRUPTED
    found = reviews.summary(run_id, scored)
    assert found, "all prompts are reviewed"
    for side, score in found["scores"].items():
        say(f"review: {side} {score:g} of 5, better on {found['better'][side]} of {found['reviews']} prompts")
    say(f"report: {write_report(run_id)}")
    say(f"review: kept in the run; python -m sweeps gate {run_id} judges with it, promote {run_id} registers")
    answer(arguments, {"run_id": run_id} | found)
    return DONE


def harness(arguments: argparse.Namespace) -> int:
    from sweeps import harness as runs

    fields = ("include_path", "num_fewshot", "limit", "apply_chat_template")
    suite = {name: getattr(arguments, name) for name in fields}
    found = runs.run(arguments.target, arguments.model, tasks=tuple(arguments.tasks.split(",")), **suite)
    for name, value in found.items():
        say(f"  {name:40} {value:g}")
    answer(arguments, {"target": arguments.target, "metrics": found})
    return DONE


def submit(arguments: argparse.Namespace) -> int:
    loading.load(arguments.definition)
    from sweeps import jobs

    code, last = jobs.submit(arguments.definition, arguments.address, arguments.wait)
    if arguments.json:
        print(last if arguments.wait else json.dumps({"job_id": last}))
    return code


def answer(arguments: argparse.Namespace, value: dict[str, Any]) -> None:
    """The last line of standard output, for programs."""
    if arguments.json:
        print(json.dumps(value), flush=True)


def _finish(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    """Say how a run ended and what to do next; its exit status."""
    from cluster import paths

    _say_checks(result["gate"] or {"checks": []})
    if result["dataset_hash"]:
        say(f"data: {paths.data_page(result['dataset_hash'])}")
    if result["trials"]:
        say(f"report: {paths.report_file(result['run_id'])}")
    endings = {
        "accepted": (DONE, "accepted"),
        "rejected": (REJECTED, "rejected by the gate; nothing was registered"),
        "interrupted": (INTERRUPTED, f"interrupted; go on with: python -m sweeps resume {result['run_id']}"),
    }
    code, line = endings[result["status"]]
    if result["model"]:
        line = f"accepted: {result['model']['name']}@{result['model']['version']} is production"
    say(line)
    answer(arguments, result)
    return code


def _say_checks(verdict: dict[str, Any]) -> None:
    for check in verdict["checks"]:
        passed = "passed" if check["passed"] else "FAILED"
        say(f"gate: {passed}  {check['name']} {check['value']} (limit {check['limit']})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sweeps", description="Search, prove and register fine-tuned models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=summary, description=summary)
        command.set_defaults(function=function)
        command.add_argument("--json", action="store_true", help="end standard output with one JSON object")
        return command

    for function, summary in {
        validate: "check a definition and the files it names",
        data: "prepare a definition's data and show what is in it",
        plan: "show what a sweep would do",
        run: "run a sweep, from data to registered model",
    }.items():
        add(function, summary).add_argument("definition", type=Path, metavar="DEF")
    for function, summary in {
        resume: "go on with an interrupted run",
        status: "show the trials of a run",
        report: "write report.html again",
    }.items():
        add(function, summary).add_argument("run", metavar="RUN")
    command = add(promote, "gate and register one trial of a run")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--trial", metavar="ID", help="default: the run's best")
    command = add(gate, "judge a scored run again, without training; for use in CI")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--limits", type=Path, metavar="DEF", help="a definition whose gate section to judge by")
    command = add(review, "score answers of base and winner without knowing whose they are")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--prompts", type=int, default=20, metavar="N", help="in all (default 20); kept ones count")
    command.add_argument("--reviewer", metavar="NAME", help="default: your user name")
    command.add_argument("--port", type=int, default=0, help="on this machine; default: a free one")
    command = add(harness, "run lm-evaluation-harness on a registered model or a served endpoint")
    command.add_argument("target", metavar="MODEL[@VERSION]|URL")
    command.add_argument("--tasks", required=True, metavar="TASK[,TASK]")
    command.add_argument("--model", metavar="NAME", help="of an endpoint: which of its models")
    command.add_argument("--include-path", metavar="DIR", help="task files of your own")
    command.add_argument("--num-fewshot", type=int, metavar="N")
    command.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    command.add_argument("--apply-chat-template", action="store_true", help="ask as a chat; an endpoint always does")
    command = add(submit, "run a sweep as a job on a Ray cluster")
    command.add_argument("definition", type=Path, metavar="DEF")
    command.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, http://host:8265")
    command.add_argument("--no-wait", dest="wait", action="store_false", help="return at once")
    add(schema, "print the JSON Schema of a definition")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return guarded(
        lambda: arguments.function(arguments), "interrupted before a run began; start it again with the same command"
    )


if __name__ == "__main__":
    sys.exit(main())
