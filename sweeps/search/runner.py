"""Runs a search, or what an interrupted one left of it, with Ray Tune."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

from cluster import files, paths, session
from cluster.command import say
from sweeps.definition import SweepDefinition
from sweeps.search import study as studies
from sweeps.search.ledger import Ledger
from sweeps.search.scheduler import WatchedASHA
from sweeps.search.searcher import StudySearcher
from sweeps.search.study import TrialRecord
from sweeps.search.table import LiveTable
from sweeps.search.tracking import tracked
from sweeps.search.trainable import train_trial
from trainables import host
from trainables.contract import ADAPTER, CannotPack, is_whole, steps_per_epoch
from trainables.data.snapshot import Snapshot

# Tune's own checks and prints stand down: WatchedASHA judges reports, LiveTable speaks to people.
_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_RELAY: dict[str, float] = {"memory": 2**28}
"""What a packed trial's own process takes: it hands reports on, and Tune wants a resource named. In bytes."""

_ASIDE = "left"
"""In a trial's directory: the checkpoint that this session went on from."""

_SPARE = 1
"""Packed trials that wait, suggested and started, for the next free slot."""


def run_search(definition: SweepDefinition, run_id: str, data: Snapshot) -> list[TrialRecord]:
    """Run every trial that the study does not hold as ended yet; returns all trials of the run.

    Ends early, with trials still RUNNING in the study, on SIGINT.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    study = studies.open_study(run_id, definition.search)
    ledger = Ledger()
    searcher = StudySearcher(study, definition.search, ledger, max(1.0, definition.resources.gpus_per_trial))
    if searcher.remaining > 0:
        left = _set_aside(run_id, searcher)
        scheduler = _scheduler(definition, data, ledger)
        scheduler.replay(studies.records(study))
        with (
            tracked(definition.tracking, run_id, ledger) as tracking,
            _engines(definition, run_id, data) as accounts,
            session.trials_like_workers(),
        ):
            _tuner(definition, run_id, data, searcher, scheduler, left, accounts, tracking).fit()
    records = studies.records(study)
    for record in records:
        _keep_adapter(run_id, record)
    return records


@contextmanager
def _engines(definition: SweepDefinition, run_id: str, data: Snapshot) -> Iterator[host.Accounts]:
    """The engines of a packed sweep while it runs, none of a solo one, and their accounts, which go to the run.

    Raises:
        ValueError: the definition insists on packed trials, and the base is none that they can share.
    """
    if not definition.packs:
        yield host.Accounts([])
        return
    resources = definition.resources
    gib = resources.memory_gib_per_engine
    config = host.EngineConfig(
        definition.base_model,
        str(data.directory),
        definition.training,
        definition.largest_training,
        definition.slots_per_engine,
        gib and gib * 2**30,
        definition.measurement,
    )
    try:
        engines = host.start(resources.engines, resources.engine_as_ray(), config)
    except CannotPack as obstacle:
        definition.check_may_be_solo(str(obstacle))
        say(f"search: solo after all, because {obstacle}")
        yield host.Accounts([])
        return
    accounts = host.Accounts(engines)
    try:
        yield accounts
    finally:
        try:
            file = paths.engines_file(run_id)
            earlier = files.read_json(file) if file.exists() else []
            files.write_json(file, earlier + accounts.last())
        finally:
            host.stop(engines)


def savings(run_id: str) -> str | None:
    """What packing saved in a run's training, as a line; None for a run of solo trials.

    Both sides are the engines' own clocks: seconds of training passes, and the tokens in them at what a token cost in
    passes with one trial, which each engine makes before it takes any, and again when only one is left.
    """
    file = paths.engines_file(run_id)
    if not file.exists():
        return None
    engines = [engine["counters"] for engine in files.read_json(file) if engine["counters"]["alone_tokens"]]
    packed = sum(counters["training_s"] for counters in engines)
    if not packed:
        return None
    alone = sum(counters["tokens"] * counters["alone_s"] / counters["alone_tokens"] for counters in engines)
    return f"packing: {packed:.0f} device-seconds of training, {alone:.0f} one trial at a time ({alone / packed:.2f}x)"


def _scheduler(definition: SweepDefinition, data: Snapshot, ledger: Ledger) -> WatchedASHA:
    spec = definition.scheduler
    an_epoch = steps_per_epoch(data.count("train"), definition.training.effective_batch)
    grace = spec.grace_period * an_epoch if definition.stops_early else 0
    return WatchedASHA(ledger, grace, definition.longest_trial_epochs * an_epoch, spec.reduction_factor)


def _tuner(
    definition: SweepDefinition,
    run_id: str,
    data: Snapshot,
    searcher: StudySearcher,
    scheduler: WatchedASHA,
    left_checkpoints: dict[int, Path],
    accounts: host.Accounts,
    tracking: list[tune.Callback],
) -> Tuner:
    engines = accounts.engines
    trainable: Any = tune.with_parameters(
        train_trial,
        definition=definition,
        dataset=str(data.directory),
        resume_from={studies.trial_id(number): str(found) for number, found in left_checkpoints.items()},
        **({"engines": engines} if engines else {}),
    )
    slots = sum(ray.get([engine.capacity.remote() for engine in engines])) if engines else None
    callbacks: list[tune.Callback] = [LiveTable(searcher.study, definition.search.num_samples), *tracking]
    if engines:
        callbacks.append(_Slots(accounts, searcher.remaining))
    return Tuner(
        tune.with_resources(trainable, _RELAY if engines else definition.resources.as_ray()),
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=searcher.remaining,
            max_concurrent_trials=_at_once(definition.search.max_concurrent_trials, slots),
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=RunConfig(
            # with the run in the name: two drivers that start in one second would share Tune's scratch directory
            name=str(paths.trials_dir(run_id).relative_to(paths.runs())),
            storage_path=str(paths.runs()),
            failure_config=FailureConfig(max_failures=definition.search.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _at_once(wanted: int | None, slots: int | None) -> int | None:
    """Trials that Tune may have started; ``slots`` is None where they are solo.

    Engines have equally many slots, so all of them may be more than are wanted; then none waits for one.
    """
    if slots is None:
        return wanted
    return slots + _SPARE if wanted is None or slots <= wanted else wanted


class _Slots(tune.Callback):
    """Frees the slot of a trial that is stopped or lost: its own process may not run again, or not be there any more.

    A trial that goes on in its slot while the scheduler decides is not waited for; what it learned then is thrown away.
    When all trials have begun, those that are left are spread evenly over the engines.
    """

    def __init__(self, accounts: host.Accounts, trials: int) -> None:
        self.accounts, self.engines, self.trials = accounts, accounts.engines, trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        host.evict(self.engines, trial.config["trial_id"], for_good=True)
        self._even_out(trials, trial, goes_on=False)

    on_trial_error = on_trial_complete

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        host.evict(self.engines, trial.config["trial_id"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.accounts.look()
        if not result.get("done"):  # of a stopped one the end is told next
            self._even_out(trials, trial, goes_on=True)

    def _even_out(self, trials: list[Any], judged: Any, goes_on: bool) -> None:
        if len(self.engines) > 1 and len(trials) == self.trials and all(trial.status != "PENDING" for trial in trials):
            host.even_out(self.engines, judged.config["trial_id"], goes_on)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _name(trial: Any) -> str:
    return trial.config["trial_id"]


def _set_aside(run_id: str, searcher: StudySearcher) -> dict[int, Path]:
    """By trial number, what an interrupted session's unfinished trials go on from.

    Tune numbers a trial's checkpoints from 0 in each session: it would write into those of the last one, or leave one
    with a higher number than its own, which then passed for the newest.
    """
    left = {}
    for trial in searcher.unfinished:
        name = studies.trial_id(trial.number)
        newest, aside = last_checkpoint(run_id, name), paths.trial_dir(run_id, name) / _ASIDE
        if newest and newest != aside:
            shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
        for other in _checkpoints(run_id, name):
            shutil.rmtree(other)
        if newest:
            left[trial.number] = aside
    return left


def last_checkpoint(run_id: str, trial_id: str) -> Path | None:
    """The newest checkpoint of a trial that was copied whole before its process or the driver ended."""
    aside = paths.trial_dir(run_id, trial_id) / _ASIDE
    return next((path for path in [*reversed(_checkpoints(run_id, trial_id)), aside] if is_whole(path)), None)


def _checkpoints(run_id: str, trial_id: str) -> list[Path]:
    """Of the last session, in their order."""
    return sorted(paths.trial_dir(run_id, trial_id).glob("checkpoint_*"))


def _keep_adapter(run_id: str, record: TrialRecord) -> None:
    """The best adapter of an ended trial, out of its last checkpoint to where a person looks for it."""
    target = paths.adapter_dir(run_id, record.trial_id)
    checkpoint = last_checkpoint(run_id, record.trial_id)
    if record.state != "RUNNING" and checkpoint and not target.exists():
        with files.new_directory(target) as unfinished:
            shutil.copytree(checkpoint / ADAPTER, unfinished, dirs_exist_ok=True)
