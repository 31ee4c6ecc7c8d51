"""The search on a real Ray cluster and a real Optuna journal, with trials that do not train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
import toy_trials
from optuna.trial import TrialState

from cluster import files, paths, session
from sweeps import loading
from sweeps.definition import SweepDefinition
from sweeps.search import runner, tracking
from sweeps.search import study as studies
from trainables.contract import seal

DATA = SimpleNamespace(directory=Path("unused"), count=lambda _: 64)  # 4 steps an epoch at the batch of 16


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    tracking.prepare_environment()
    ray.cloudpickle.register_pickle_by_value(toy_trials)
    with session.forked(["sweeps.search.trainable"]), session.connected():
        yield
    ray.cloudpickle.unregister_pickle_by_value(toy_trials)


@pytest.fixture
def search(home: Path, definition, monkeypatch: pytest.MonkeyPatch):
    """Runs a search over ``ranks`` in this order, and returns its definition and records."""
    monkeypatch.setattr(runner, "train_trial", toy_trials.toy_trial)

    def run(ranks: list[int], run_id: str = "run", **sections: Any) -> tuple[SweepDefinition, list]:
        content = definition(**sections)
        content["training"] |= {"num_train_epochs": 2, "backend": "solo"}  # toy trials train nothing on an engine
        content["search"] |= {
            "num_samples": len(ranks),
            "space": {"r": {"choices": sorted(set(ranks))}, "learning_rate": {"low": 0.001, "high": 1.0}},
            "points_to_evaluate": [
                {"r": r, "learning_rate": round(1.0 - index / 20, 2)} for index, r in enumerate(ranks)
            ],
        }
        content.setdefault("tracking", {"enabled": False})
        loaded = loading.parse(content, "test")
        files.write_json(paths.sweep_file(run_id), loaded.model_dump(mode="json"))
        return loaded, runner.run_search(loaded, run_id, DATA)  # type: ignore[arg-type]

    return run


def in_optuna(run_id: str = "run") -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(paths.study_file(run_id))))
    return optuna.load_study(study_name=run_id, storage=storage).trials


def test_pruned_is_pruned_with_its_intermediate_values(search) -> None:
    _, records = search([8, 9, 10, 11, 12, 13], scheduler={"grace_period": 0.5, "reduction_factor": 2},
                        search={"max_concurrent_trials": 1})  # fmt: skip
    states = [record.state for record in records]
    assert states[0] == "COMPLETE"
    assert states[1:] == ["PRUNED"] * 5, "each later trial is worse than the first at the first rung"
    trials = in_optuna()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] + [TrialState.PRUNED] * 5
    assert trials[0].value == pytest.approx(3 / 8 - 1.0)
    assert sorted(trials[0].intermediate_values) == list(range(1, 9))
    assert sorted(trials[1].intermediate_values) == [1, 2], "the report at which it was stopped is kept"
    assert studies.best(records) == records[0]


def test_a_trial_that_passed_too_early_is_pruned_where_it_stands(search, capsys) -> None:
    _, records = search([21, 20, 8], scheduler={"grace_period": 0.5, "reduction_factor": 2})
    assert [record.state for record in records] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert sorted(in_optuna()[1].intermediate_values) == [1, 2]
    table = capsys.readouterr().err
    assert table.index("t0001  PRUNED") < table.index("at step 8"), "at once"


def test_a_trial_that_is_tried_again_is_not_over(monkeypatch) -> None:
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(runner.host, "evict", lambda _, name, for_good=False: told.append((name, for_good)))
    slots = runner._Slots(SimpleNamespace(engines=[None]), 4)  # type: ignore[arg-type]
    for name in ("complete", "error", "recover"):
        trial = SimpleNamespace(config={"trial_id": name})
        getattr(slots, f"on_trial_{name}")(iteration=1, trials=[trial], trial=trial)
    assert told == [("complete", True), ("error", True), ("recover", False)]


def test_each_failure_stays_its_own_trials(search) -> None:
    _, records = search([1, 2, 3, 5, 6, 8], scheduler={"type": "none"}, search={"max_failures": 0})
    assert [(record.state, record.reason) for record in records] == [
        ("FAILED", "nan"),
        ("FAILED", "error"),
        ("FAILED", "error"),
        ("FAILED", "error"),
        ("FAILED", "oom"),
        ("COMPLETE", None),
    ]
    assert "nan at step 2" in records[0].message
    assert "no eval_loss" in records[1].message
    assert "a bug in the user's data" in records[2].message
    assert [trial.state for trial in in_optuna()] == [TrialState.FAIL] * 5 + [TrialState.COMPLETE]


def test_a_trial_that_loses_its_process_goes_on_from_its_last_report(search) -> None:
    _, records = search([4], scheduler={"type": "none"}, search={"max_failures": 1})
    assert records[0].state == "COMPLETE"
    assert [step for step, _ in records[0].curve] == list(range(1, 9))


def test_a_trial_that_keeps_losing_its_process_is_lost(search) -> None:
    _, records = search([4], scheduler={"type": "none"}, search={"max_failures": 0})
    assert (records[0].state, records[0].reason) == ("FAILED", "lost")
    assert records[0].steps == 4


def test_a_trials_process_is_started_as_any_workers(search) -> None:
    """An environment of its own, which it has anyway, would cost it another process before it, one that imports Ray."""
    _, records = search([7])
    assert records[0].message == "{}"


def test_warm_start_comes_first_and_only_once(search) -> None:
    loaded, records = search([9, 8])
    assert [record.params for record in records] == [dict(point) for point in loaded.search.points_to_evaluate]
    more = loaded.model_copy(update={"search": loaded.search.model_copy(update={"num_samples": 4})})
    again = runner.run_search(more, "run", DATA)  # type: ignore[arg-type]
    assert len(again) == 4
    assert again[:2] == records
    assert again[2].params not in [record.params for record in records]


def test_several_objectives_make_a_multi_objective_study_that_loses_nothing(search, home: Path) -> None:
    objectives = ["trained_tokens", "eval_loss"]
    loaded, records = search([8, 9, 1, 10], search={"objectives": objectives})
    assert loaded.stops_early is False
    study = studies.open_study("run", loaded.search)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert [record.state for record in records] == ["COMPLETE", "COMPLETE", "FAILED", "COMPLETE"]
    assert [len(record.curve) for record in records] == [8, 8, 1, 8], "every evaluation is kept"
    first = records[0]
    assert first.objectives == {"trained_tokens": 800.0, "eval_loss": first.eval_loss}
    assert first.as_result()["objectives"] == first.objectives
    assert records[2].objectives == {}
    assert studies.best(records) == first, "as many tokens as all, and the lowest loss of them"
    more = loaded.model_copy(update={"search": loaded.search.model_copy(update={"num_samples": 5})})
    again = runner.run_search(more, "run", DATA)  # type: ignore[arg-type]
    assert again[:4] == records
    assert len(again[4].curve) == 8


def test_a_trial_that_was_not_measured_fails_and_says_of_what(search) -> None:
    _, records = search([8], search={"objectives": ["exact_match", "eval_loss"]})
    assert (records[0].state, records[0].reason) == ("FAILED", "error")
    assert records[0].message == "ended without a report of exact_match"


def record(trial_id: str, state: str = "COMPLETE", **objectives: float) -> studies.TrialRecord:
    known = objectives if state == "COMPLETE" else {}
    return studies.TrialRecord(trial_id, state, None, None, {}, 1.0, 1, 1, 1.0, 1.0, (), known)  # type: ignore[arg-type]


def test_the_best_by_the_first_objective_wins_and_the_front_is_what_none_beats() -> None:
    trials = [
        record("t0", exact_match=0.8, trained_tokens=500),
        record("t1", exact_match=0.9, trained_tokens=900),
        record("t2", exact_match=0.9, trained_tokens=800),
        record("t3", exact_match=0.7, trained_tokens=600),
        record("t4", "PRUNED"),
        record("t5", exact_match=0.8, trained_tokens=500),
    ]
    assert studies.best(trials) == trials[2]
    assert [trial.trial_id for trial in studies.pareto_front(trials)] == ["t0", "t2", "t5"]
    assert studies.best(trials[4:5]) is None


def test_an_unfinished_trial_is_taken_up_again_under_its_own_number(search, home: Path) -> None:
    loaded, _ = search([8], scheduler={"type": "none"})
    study = studies.open_study("run", loaded.search)
    left = study.ask()  # what a killed driver leaves: RUNNING, some values reported
    params = {"r": 8, "learning_rate": 0.5}
    for name, distribution in ((n, studies.distribution(s)) for n, s in sorted(loaded.search.space.items())):
        left._suggest(name, distribution)
    left.report(9.0, 1)
    for number in (6, 7):  # Tune's numbers of that session, of which the last was cut short
        checkpoint = paths.trial_dir("run", "t0001") / f"checkpoint_00000{number}"
        (checkpoint / "adapter").mkdir(parents=True)
        (checkpoint / "adapter" / "adapter_config.json").write_text('{"of": "before"}')
        (checkpoint / "state.json").write_text('{"step": 4}')
        if number == 6:
            seal(checkpoint)
    more = loaded.model_copy(update={"search": loaded.search.model_copy(update={"num_samples": 2})})
    records = runner.run_search(more, "run", DATA)  # type: ignore[arg-type]
    assert [record.trial_id for record in records] == ["t0000", "t0001"]
    assert records[1].state == "COMPLETE"
    assert [step for step, _ in records[1].curve] == [1, 5, 6, 7, 8], "what was reported before stays"
    assert records[1].curve[0] == (1, 9.0)
    adapter = paths.adapter_dir("run", "t0001") / "adapter_config.json"
    assert adapter.read_text() == "{}", "this session's, whatever the last one's checkpoints are called"
    assert set(records[1].params) == set(params)


def test_the_best_adapter_of_every_ended_trial_is_kept(search, home: Path) -> None:
    search([8])
    assert (paths.adapter_dir("run", "t0000") / "adapter_config.json").exists()


def test_wandb_has_a_run_a_trial_and_a_summary(search, home: Path) -> None:
    tracked = {"enabled": True, "upload_timeout_s": 20}
    loaded, records = search([8, 1], run_id="tracked", tracking=tracked, scheduler={"type": "none"})
    tracking.log_summary(loaded.tracking, "tracked", records, "t0000")
    runs = sorted((paths.run_dir("tracked") / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 3
    each = [run.read_bytes() for run in runs]
    of_trials = [said for said in each if b"tracked-summary" not in said]
    assert sorted((b"t0000" in said, b"t0001" in said) for said in of_trials) == [(False, True), (True, False)], "names"
    said = b"".join(each)
    for word in (
        b"COMPLETE",
        b"FAILED",
        b"nan",
        b"t0000",
        b"t0001",
        b"tracked-summary",
        b"eval_loss",
        b"learning_rate",
    ):
        assert word in said, word


def test_what_wandb_does_not_take_is_said_and_is_not_the_sweeps_failure(search, monkeypatch, capsys) -> None:
    for name, value in {"MODE": "online", "API_KEY": "k" * 40, "BASE_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _, records = search([8], tracking={"enabled": True, "upload_timeout_s": 1}, scheduler={"type": "none"})
    assert records[0].state == "COMPLETE"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("W&B: not all of the trials' runs were written: ")
    assert "k" * 40 not in last


@pytest.mark.parametrize(
    ("wanted", "slots", "started"), [(None, 8, 9), (4, 4, 5), (3, 4, 3), (8, 5, 6), (2, None, 2), (None, None, None)]
)
def test_no_more_trials_train_at_once_than_are_wanted(wanted, slots, started) -> None:
    """One more than there are slots is started, to wait for the next free one."""
    assert runner._at_once(wanted, slots) == started
