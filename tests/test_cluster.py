"""A sweep over a cluster of two nodes: Ray's own cluster utility, real raylets, one engine on each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import files, paths, session
from tests.conftest import winnow


@pytest.fixture
def two_nodes() -> Iterator[str]:
    session.quieten()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def test_each_node_holds_an_engine_and_trials_spread_over_them(two_nodes: str, home: Path, definition, write) -> None:
    spread = definition(
        resources={"engines": 2, "cpus_per_trial": 1},
        search={"num_samples": 4},
        scheduler={"type": "none"},
        evaluation={"few_shot": 0},
        gate={"min_score": 1.0},
        tracking={"enabled": False},
    )
    done = winnow("sweeps", "run", write(spread), "--json", env=os.environ | {"RAY_ADDRESS": two_nodes})
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [trial["state"] for trial in result["trials"]] == ["COMPLETE"] * 4
    engines = files.read_json(paths.engines_file(result["run_id"]))
    assert len({engine["node_id"] for engine in engines}) == 2
    assert all(engine["counters"]["adapter_steps"] > 0 for engine in engines)
    held = {stay["trial_id"] for engine in engines for stay in engine["stays"]}
    assert held == {trial["trial_id"] for trial in result["trials"]}
