"""Deployments that cannot be: one line, and nothing left behind. What comes up is in ``tests/test_quickstart.py``."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, winnow

from cluster import files, paths
from serving import place, registry, warming
from serving.__main__ import main


@pytest.fixture
def version(home: Path) -> registry.ModelVersion:
    """Registered, but no model: nothing here comes as far as loading it."""
    with registry.staging("tickets") as staged:
        (staged / "model.safetensors").write_text("one")
        return registry.register("tickets", staged, {"serving": {}})


def write(tmp_path: Path, settings: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(settings)
    return file


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("max_model_len: 8", ["serving.max_model_len", "unknown key"]),
        ("cpus_per_replica: many", ["serving.cpus_per_replica", "'many'"]),
        ("engine_kwargs: {tensor_parallel_size: two}", ["engine_kwargs.tensor_parallel_size", "'two'"]),
        ("engine_kwargs: {structured_outputs_config: x}", ["structured_outputs_config must be a mapping", "'x'"]),
        ("autoscaling_config: {min_replicas: 0, downscale_delay_s: 5}", ["downscale_delay_s must be above 10 s", "5"]),
        ("- 8", ["must be a mapping"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_settings_that_break_a_rule_start_nothing(version, settings: str, words: list, capsys, tmp_path: Path) -> None:
    assert main(["deploy", f"tickets@{version.version}", "--settings", str(write(tmp_path, settings))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not paths.serving_state_file().exists()


def test_a_port_that_is_taken_starts_nothing(version, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["deploy", f"tickets@{version.version}", "--port", str(port)]) == 2
    assert f"--port: must be a free port of 127.0.0.1, but {port} is not" in capsys.readouterr().err
    assert not paths.serving_state_file().exists()


def test_a_port_that_another_deployment_is_about_to_take_starts_nothing(version, capsys) -> None:
    from ray._common.network_utils import find_free_port

    port = find_free_port()
    with place.reserved(port):
        assert main(["deploy", f"tickets@{version.version}", "--port", str(port)]) == 2
    assert f"--port: {port} is being taken by another deployment; name another one" in capsys.readouterr().err
    assert not paths.serving_state_file().exists()


def test_a_cluster_that_others_use_stays_when_a_deployment_fails(home: Path, monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(place, "own_head", lambda: SimpleNamespace(stop=lambda: ended.append(1)))
    place._end_unused()
    assert len(ended) == 1
    with files.locked(paths.cluster_users_file(), shared=True):
        place._end_unused()
    place.remember("invoices", place.Deployed(versions=("v1",)))
    place._end_unused()
    assert len(ended) == 1


def test_an_address_that_others_reach_needs_a_key(version, capsys) -> None:
    from ray._common.network_utils import find_free_port

    port = str(find_free_port())
    assert main(["deploy", f"tickets@{version.version}", "--host", "0.0.0.0", "--port", port]) == 2
    assert "so a key is needed; make one: python -m serving keys add NAME" in capsys.readouterr().err
    assert not paths.serving_state_file().exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["canary", "tickets", "VERSION", "--weight", "5"], ["tickets is not deployed", "serving deploy tickets"]),
        (["canary", "tickets", "VERSION", "--weight", "0"], ["--weight", "above 0", "got 0"]),
        (["canary", "tickets", "v9", "--auto"], ["no version or alias 'v9'"]),
        (["promote", "tickets", "VERSION"], ["tickets is not deployed"]),
        (["promote", "invoices", "v1"], ["no model 'invoices'"]),
        (["rollback", "tickets"], ["tickets is not deployed"]),
    ],
)
def test_traffic_cannot_be_moved_where_nothing_is_served(version, arguments: list, words: list, capsys) -> None:
    assert main([version.version if one == "VERSION" else one for one in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert registry.aliases("tickets") == {}
    assert registry.history("tickets") == []


def test_a_replica_that_no_node_can_hold_leaves_no_cluster(version, tmp_path: Path) -> None:
    from ray._common.network_utils import find_free_port

    wanted = write(tmp_path, "gpus_per_replica: 1\nengine_kwargs: {tensor_parallel_size: 2}")
    done = winnow("serving", "deploy", f"tickets@{version.version}", "--settings", wanted, "--port", find_free_port())
    assert done.returncode == 2, done.stderr
    assert "serving: a replica wants 2 GPU but the cluster has 0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "runtime started" in paths.serving_log().read_text()
    assert not paths.serving_state_file().exists()
    assert winnow("serving", "status").stderr.strip() == "nothing is deployed"


def test_a_deployment_that_gets_sigterm_takes_its_cluster_along(version) -> None:
    from ray._common.network_utils import find_free_port

    command = [sys.executable, "-m", "serving", "deploy", f"tickets@{version.version}", "--port", str(find_free_port())]
    deploy = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert deploy.stderr
    assert any(re.match(r"deploy: \d+ s: ", line) for line in deploy.stderr), "it waits for its replicas"
    assert (head := place.own_head())
    deploy.terminate()
    _, err = deploy.communicate(timeout=120)
    assert deploy.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; see 'python -m serving status'"
    assert "Traceback" not in err
    assert not head.is_alive()
    assert not paths.serving_state_file().exists()


MESSAGE = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:tickets:initialize() (pid=1)
  File "replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  File "vllm_engine.py", line 2, in start
RuntimeError: {}
"""


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("Failed to create vLLM engine config: 1 validation error\n  max_model_len (100000) is too great", ValueError),
        ("Engine core initialization failed", RuntimeError),
    ],
)
def test_the_last_error_is_the_cause(cause: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming.session, "logs", lambda: Path("logs"))
    failure = warming._failure("tickets", MESSAGE.format(cause))
    assert type(failure) is kind
    assert " ".join(cause.split()) in str(failure)
    assert "Traceback" not in str(failure)
    assert "\n" not in str(failure)


def test_a_replica_that_finds_no_room_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    waiting = (
        "Deployment 'v2' in application 'tickets' has 1 replicas that have taken more than 30s to be scheduled. "
        'Resources required for each replica: {"CPU": 1.0}, total resources available: {"CPU": 0.0}. Use `ray status`.'
    )
    states = {"v1": ("", {"RUNNING": 2}), "v2": (waiting, {"STARTING": 1})}
    deployments = {name: SimpleNamespace(message=told, replica_states=has) for name, (told, has) in states.items()}
    app = SimpleNamespace(status="DEPLOYING", deployments=deployments)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"tickets": app}))
    monkeypatch.setattr(warming, "TELL_S", 0)
    monkeypatch.setattr(warming, "POLL_S", 0.1)
    monkeypatch.setattr(warming, "_ROOM_S", 0.3)
    told: list[str] = []
    with pytest.raises(ValueError, match=r"no room for tickets's v2 in 0 s: a replica wants .*max_replicas") as caught:
        warming._wait_until_running("tickets", told.append)
    assert '{"CPU": 1.0} and {"CPU": 0.0} is free' in str(caught.value)
    assert told[0] == "deploy: 0 s: v1 RUNNING, v2 STARTING (no room yet)"


async def _answers(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        (["a"], (["a", "b"], ["a"])),
        (["c"], (["a", "b", "c"], ["c"])),  # requests wait for what is not up yet
    ],
)
def test_without_room_a_version_leaves_the_traffic_before_it_goes(
    wanted: list[str], first: tuple[list[str], list[str]], home, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    place.remember("tickets", place.Deployed(versions=("a", "b"), settings={"old": 1}))
    for name, stand_in in {
        "_room": lambda *_: False,
        "_changed": lambda *_: ["a"],
        "_SETTLE_S": 0,
        "_TOLD_S": 0,
        "_run": lambda _, now, versions, warm, *__: steps.append((now.settings, [*versions], [*warm])),
        "_wait_until_running": lambda *_: steps.append("runs"),
        "_ask": _answers,
        "_cold_start": lambda *_: "no time",
    }.items():
        monkeypatch.setattr(warming, name, stand_in)
    now = replace(place.deployed()["tickets"], settings={"new": 2})
    warming.bring("tickets", now, wanted, lambda _: None)
    assert steps == [({"old": 1}, *first), ({"new": 2}, wanted, wanted), "runs"]
    assert place.deployed()["tickets"].versions == tuple(wanted)
    assert place.deployed()["tickets"].code == place.code()


def test_new_code_of_ours_starts_replicas_anew(version) -> None:
    place.remember("tickets", place.Deployed(versions=(version.version,), code="of the last release"))
    now = place.deployed()["tickets"]
    assert warming._changed("tickets", now, now.versions) == [version.version]
    place.remember("tickets", replace(now, code=place.code()))
    assert warming._changed("tickets", now, now.versions) == []
    assert warming._changed("tickets", replace(now, settings={"cpus_per_replica": 2}), now.versions) == [
        version.version
    ]
