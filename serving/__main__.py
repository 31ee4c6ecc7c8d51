"""``python -m serving``: deploy, status, models, stop."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cluster.command import DONE, guarded, say
from cluster.settings import read_yaml
from serving import registry


def deploy(arguments: argparse.Namespace) -> dict[str, Any]:
    registry.find(arguments.model)  # a mistake in the name costs no second
    changes = _settings(arguments.settings) if arguments.settings else {}
    from serving import rollout

    deployed = rollout.deploy(arguments.model, arguments.port, changes, say)
    say(f"try: {curl(deployed['url'], deployed['model'])}")
    return deployed


def _settings(file: Path) -> dict[str, Any]:
    """Keys of a definition's serving section."""
    found = read_yaml(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a mapping of keys of 'serving', but got {type(found).__name__}")
    return found


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
            command.add_argument(
                "--settings",
                type=Path,
                metavar="FILE",
                help="YAML: keys of a definition's serving section, in the place of the registered ones",
            )
            command.add_argument("--port", type=int, help="HTTP port on loopback (default 8000)")
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
