"""``python -m serving``: deploy, status, models, stop."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from cluster.command import DONE, guarded, say
from serving import registry


def deploy(arguments: argparse.Namespace) -> dict[str, Any]:
    registry.find(arguments.model)  # a mistake in the name costs no second
    from serving import rollout

    deployed = rollout.deploy(arguments.model, arguments.port, say)
    say(f"try: {curl(deployed['url'], deployed['model'])}")
    return deployed


def status(_: argparse.Namespace) -> dict[str, Any]:
    from serving import rollout

    found = rollout.status()
    for name, app in found["applications"].items():
        say(f"{name}@{app['version']}  {app['status']}  {app['replicas']}")
    if not found["applications"]:
        say("nothing is deployed")
    return found


def models(_: argparse.Namespace) -> dict[str, Any]:
    listed: dict[str, dict[str, Any]] = {
        model: {"versions": registry.versions(model), "aliases": registry.aliases(model)} for model in registry.models()
    }
    for model, known in listed.items():
        pointing = {version: alias for alias, version in known["aliases"].items()}
        for version in known["versions"]:
            say(f"{model}@{version}  {pointing.get(version, '')}")
    if not listed:
        say("no model is registered; run a sweep first: python -m sweeps run DEF")
    return {"models": listed}


def stop(_: argparse.Namespace) -> dict[str, Any]:
    from serving import rollout

    return rollout.stop(say)


def curl(url: str, model: str) -> str:
    """A command that a person can paste."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    return f"curl -s {url}/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve registered models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    summaries = {
        deploy: "serve a registered model until stop",
        status: "show what is deployed",
        models: "list registered models, versions and aliases",
        stop: "stop serving and what deploy started",
    }
    for function, summary in summaries.items():
        command = commands.add_parser(function.__name__, help=summary, description=summary)
        command.set_defaults(function=function)
        command.add_argument("--json", action="store_true", help="end standard output with one JSON object")
        if function is deploy:
            command.add_argument("model", metavar="MODEL[@VERSION]")
            command.add_argument("--port", type=int, default=8000, help="HTTP port on loopback (default 8000)")
    return parser


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
