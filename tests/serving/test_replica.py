"""How Serve is told to run a version, and how a silent engine is found; all without an engine."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.llm._internal.serve.constants import DEFAULT_HEALTH_CHECK_PERIOD_S, DEFAULT_HEALTH_CHECK_TIMEOUT_S
from ray.serve.config import AutoscalingConfig

from serving import ahead, engine, replica
from serving.registry import ModelVersion
from serving.spec import REPORTS_S, ServingSpec

VERSION = ModelVersion("tickets", "v1", Path("nowhere"))


def test_grammars_are_of_a_kind_that_bounds_a_step_unless_settings_say_otherwise() -> None:
    def structured(**kwargs: object) -> dict:
        return engine.engine_kwargs(ServingSpec(engine_kwargs=kwargs))["structured_outputs_config"]

    assert structured() == {"backend": "guidance"}
    assert structured(structured_outputs_config={"disable_any_whitespace": True}) == {
        "backend": "guidance",
        "disable_any_whitespace": True,
    }
    assert structured(structured_outputs_config={"backend": "xgrammar"}) == {"backend": "xgrammar"}


@pytest.mark.parametrize(
    "spec",
    [
        ServingSpec(),
        ServingSpec(cpus_per_replica=2, engine_kwargs={"tensor_parallel_size": 2}),
        ServingSpec(gpus_per_replica=1),
        ServingSpec(gpus_per_replica=1, engine_kwargs={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ServingSpec(gpus_per_replica=0.5, cpus_per_replica=0),
    ],
)
def test_a_replica_is_placed_as_rays_own_builder_would_place_it(spec: ServingSpec, monkeypatch) -> None:
    # Theirs asks Ray for the driver's environment, and Ray would start itself.
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={"pip": ["one"]}))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    ours = engine.deployment(VERSION, spec, surge=True, begins=True)._bound_deployment._replica_config
    arguments = engine.llm_arguments(VERSION, spec)
    config = replica.LLMConfig(**arguments, deployment_config={"ray_actor_options": {"num_cpus": 0}})
    theirs = replica.LeasedServer.get_deployment_options(config)

    def some(bundles: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]

    assert some(ours.placement_group_bundles) == some(theirs["placement_group_bundles"])
    assert ours.placement_group_strategy == theirs["placement_group_strategy"]
    environment = theirs["ray_actor_options"]["runtime_env"]
    environment.pop("worker_process_setup_hook")  # does nothing
    assert ours.ray_actor_options["runtime_env"] == environment
    assert (DEFAULT_HEALTH_CHECK_PERIOD_S, DEFAULT_HEALTH_CHECK_TIMEOUT_S) == (engine._HEALTH_S, engine._HEALTH_S)


def test_a_core_is_forked_where_one_worker_has_no_gpu_and_from_what_this_vllm_has(monkeypatch) -> None:
    def forks(**settings: Any) -> bool:
        return ahead.WANTED in engine.environment(ServingSpec(**settings))

    assert forks()
    assert not forks(gpus_per_replica=0.5)
    assert not forks(engine_kwargs={"tensor_parallel_size": 2})
    assert not forks(engine_kwargs={"distributed_executor_backend": "mp"})
    assert all(importlib.util.find_spec(name) for name in ahead.LOADED)

    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    before = utils.get_mp_context
    monkeypatch.setenv(ahead.WANTED, "1")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    with ahead.forked():
        assert utils.get_mp_context().get_start_method() == "forkserver"
    with pytest.raises(RuntimeError, match="to fork an engine's core from has ended"), ahead.forked():
        raise EOFError
    assert utils.get_mp_context is before
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    with ahead.forked():
        assert utils.get_mp_context is before


def test_what_is_asked_of_replicas_is_reported_more_often_than_serve_would() -> None:
    config = engine.deployment(VERSION, ServingSpec(), surge=True, begins=True)._bound_deployment._deployment_config
    assert config.autoscaling_config
    assert config.autoscaling_config.metrics_interval_s == REPORTS_S < AutoscalingConfig().metrics_interval_s


def test_an_argument_that_vllm_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"serving\.engine_kwargs\.max_sequences: .*; did you mean 'max_num_seqs'\?"):
        engine.deployment(VERSION, ServingSpec(engine_kwargs={"max_sequences": 8}), surge=True, begins=True)
    engine.deployment(VERSION, ServingSpec(engine_kwargs={"max_logprobs": 5}), surge=True, begins=True)


def test_what_vllm_is_not_asked_about_it_knows() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert {field.name for field in fields(AsyncEngineArgs)} >= engine._USUAL


def test_whoever_does_not_answer_is_silent_and_whoever_fails_is_not(monkeypatch) -> None:
    monkeypatch.setattr(replica, "_ASK_S", 0.0)
    asked: list[float] = []

    async def answers_then_fails_then_is_silent() -> None:
        asked.append(0.0)
        if len(asked) == 2:
            raise RuntimeError("dead")
        if len(asked) == 4:
            await asyncio.sleep(60)

    async def run() -> None:
        async with asyncio.timeout(10):
            await replica.until_silent(answers_then_fails_then_is_silent, 0.2)

    asyncio.run(run())
    assert len(asked) == 4
