"""``python -m serving``: deploy, canary, promote, rollback, status, models, keys, stop."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.command import DONE, guarded, say
from cluster.settings import read_yaml
from serving import keys, registry


def deploy(arguments: argparse.Namespace) -> dict[str, Any]:
    """serve a registered model until stop"""
    registry.find(arguments.model)  # a mistake in the name costs no second
    changes = _settings(arguments.settings) if arguments.settings else {}
    from serving import rollout

    deployed = rollout.deploy(arguments.model, arguments.host, arguments.port, changes, say)
    say(f"try: {curl(deployed['url'], deployed['model'])}")
    return deployed


def _settings(file: Path) -> dict[str, Any]:
    """Keys of a definition's serving section."""
    found = read_yaml(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a mapping of keys of 'serving', but got {type(found).__name__}")
    return found


def canary(arguments: argparse.Namespace) -> dict[str, Any]:
    """warm a version and send it a share of the traffic"""
    from serving import rollout

    return rollout.canary(arguments.model, arguments.version, None if arguments.auto else arguments.weight, say)


def promote(arguments: argparse.Namespace) -> dict[str, Any]:
    """make a version production"""
    from serving import rollout

    return rollout.promote(arguments.model, arguments.version, say)


def rollback(arguments: argparse.Namespace) -> dict[str, Any]:
    """end the canary, or go back to the previous production"""
    from serving import rollout

    return rollout.rollback(arguments.model, say)


def status(_: argparse.Namespace) -> dict[str, Any]:
    """show what is deployed, its traffic and what was counted"""
    from serving import rollout

    found = rollout.status()
    for name, app in found["applications"].items():
        say(f"{name}@{app['version']}  {app['status']}  {app['replicas']}")
        if plan := app.get("canary"):
            step = "by hand" if plan["step"] is None else f"step {plan['step'] + 1} of its timetable"
            say(f"  canary {plan['version']}  {plan['weight']:g} %  {step}")
        for who, counts in app.get("variants", {}).items():
            say(f"  {who}  {_words(counts)}")
    if not found["applications"]:
        say("nothing is deployed")
    elif found["metrics"]:
        say(f"metrics for Prometheus: {found['metrics']}")
    return found


def _words(counts: dict[str, Any]) -> str:
    shown = (
        "requests",
        "errors",
        "invalid",
        "cut",
        "completion_tokens",
        "first_token_p50_s",
        "latency_p95_s",
        "feedback_mean",
    )
    return "  ".join(f"{name} {counts[name]}" for name in shown if counts[name] is not None)


def models(_: argparse.Namespace) -> dict[str, Any]:
    """list registered models, versions and aliases"""
    listed: dict[str, dict[str, Any]] = {
        model: {"versions": registry.versions(model), "aliases": registry.aliases(model)} for model in registry.models()
    }
    for model, known in listed.items():
        for version in known["versions"]:
            pointing = [alias for alias, pointed in known["aliases"].items() if pointed == version]
            say(f"{model}@{version}  {', '.join(pointing)}")
    if not listed:
        say("no model is registered; run a sweep first: python -m sweeps run DEF")
    return {"models": listed}


def api_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """add, list and remove API keys; a key is shown once"""
    if arguments.action == "add":
        plain = keys.add(arguments.name, arguments.requests_per_minute, arguments.tokens_per_minute)
        say("this key is shown once, and stored nowhere:")
        if not arguments.json:
            print(plain, flush=True)
        return {"name": arguments.name, "key": plain}
    if arguments.action == "remove":
        keys.remove(arguments.name)
    for key in keys.read():
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        say("  ".join([key.name, *(f"{limit} {name} a minute" for name, limit in limits.items() if limit)]))
    return {"keys": [key.name for key in keys.read()]}


def stop(_: argparse.Namespace) -> dict[str, Any]:
    """stop serving and what deploy started"""
    from serving import rollout

    return rollout.stop(say)


def curl(url: str, model: str) -> str:
    """A command that a person can paste."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    key = "-H 'Authorization: Bearer KEY' " if keys.read() else ""
    return f"curl -s {url}/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve registered models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[..., Any], name: str = "") -> argparse.ArgumentParser:
        summary = function.__doc__ or ""
        made = commands.add_parser(name or function.__name__, help=summary, description=summary)
        made.set_defaults(function=function)
        made.add_argument("--json", action="store_true", help="end standard output with one JSON object")
        return made

    made = command(deploy)
    made.add_argument("model", metavar="MODEL[@VERSION]")
    made.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="YAML: keys of a definition's serving section, in the place of the registered ones",
    )
    made.add_argument("--host", help="address to listen on (default 127.0.0.1); beyond loopback API keys are required")
    made.add_argument("--port", type=int, help="HTTP port (default 8000)")
    made = command(canary)
    _names(made)
    share = made.add_mutually_exclusive_group(required=True)
    share.add_argument("--weight", type=float, metavar="PERCENT", help="of the traffic, until somebody moves it")
    share.add_argument("--auto", action="store_true", help="by the timetable of serving.canary, judged at every step")
    _names(command(promote))
    command(rollback).add_argument("model", metavar="MODEL")
    command(status)
    command(models)
    made = command(api_keys, "keys")
    actions = made.add_subparsers(dest="action", required=True, metavar="add|list|remove")
    last = argparse.ArgumentParser(add_help=False)  # --json may stand at the end here too
    last.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    added = actions.add_parser("add", help="make a key", parents=[last])
    added.add_argument("name", metavar="NAME")
    added.add_argument("--requests-per-minute", type=int, metavar="N")
    added.add_argument("--tokens-per-minute", type=int, metavar="N")
    actions.add_parser("list", help="names and limits", parents=[last])
    actions.add_parser("remove", help="forget a key", parents=[last]).add_argument("name", metavar="NAME")
    command(stop)
    return parser


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("version", metavar="VERSION")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)

    def command() -> int:
        value = arguments.function(arguments)
        if arguments.json:
            print(json.dumps(value), flush=True)
        return DONE

    return guarded(command, "interrupted; see 'python -m serving status'")


if __name__ == "__main__":
    sys.exit(main())
