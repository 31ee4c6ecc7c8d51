"""The function that Ray Tune runs for each trial: a backend between Tune's session and the trial contract."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Checkpoint

from cluster import files, session
from sweeps.definition import SweepDefinition
from trainables import host
from trainables.contract import ADAPTER, REPORT, Report, TrialConfig, TrialFailure


def train_trial(
    config: dict[str, Any],
    definition: SweepDefinition,
    dataset: str,
    resume_from: dict[str, str],
    engines: Sequence[Any] = (),
) -> None:
    """One trial of a sweep, in a Tune worker.

    A failure that would come again (out of memory, a loss that is no number) is reported as a result and ends the
    trial; anything else propagates, so that Tune retries it from its last checkpoint.

    Args:
        config: ``trial_id`` and the suggested parameters.
        resume_from: by trial id, the checkpoint of a trial that an interrupted run left unfinished.
        engines: where packed trials find a slot; none for solo ones.
    """
    session.use_what_ray_gave()
    run_trial = partial(host.run_trial, engines) if engines else _solo()
    measure = _measure(definition, dataset, engines)
    params = {name: value for name, value in config.items() if name != "trial_id"}
    trial = TrialConfig(
        trial_id=config["trial_id"],
        base_model=definition.base_model,
        training=definition.trial_training(params),
        dataset=dataset,
        reference_batch=definition.training.effective_batch,
    )
    retried = tune.get_checkpoint()
    checkpoint = retried.path if retried else resume_from.get(trial.trial_id)
    with tempfile.TemporaryDirectory(prefix=f"winnow-{trial.trial_id}-") as workdir:
        start = Path(checkpoint) if checkpoint else None
        reports = _Reports(start, Path(workdir) / "best" if measure else None)
        (Path(workdir) / "training").mkdir()
        if start and not retried:
            tune.report(reports.last)  # the driver of before may not have lived to take it, and it may be the last one
        try:
            run_trial(trial, Path(workdir) / "training", start, reports)
            if measure:
                tune.report(reports.last | {"measured": measure(Path(workdir) / "best")})
        except TrialFailure as failure:
            tune.report({"failure_reason": failure.reason, "failure_message": failure.message})


class _Reports:
    """Hands reports to Tune, and keeps what is needed of the last one once training has ended.

    Args:
        start: the checkpoint that the trial goes on from: it may have ended there.
        adapter: where to keep the best adapter so far; None keeps none.
    """

    def __init__(self, start: Path | None, adapter: Path | None) -> None:
        self.adapter = adapter
        self.last: dict[str, Any] = files.read_json(start / REPORT) if start else {}
        if start and adapter:
            shutil.copytree(start / ADAPTER, adapter)

    def __call__(self, report: Report, checkpoint: Path) -> None:
        self.last = report.as_dict()
        if self.adapter:
            shutil.rmtree(self.adapter, ignore_errors=True)
            shutil.copytree(checkpoint / ADAPTER, self.adapter)
        tune.report(self.last | report.for_its_judge(), checkpoint=Checkpoint.from_directory(checkpoint))


def _measure(
    definition: SweepDefinition, dataset: str, engines: Sequence[Any]
) -> Callable[[Path], dict[str, float]] | None:
    """What measures a trained adapter: an engine, or this process, which has the trial's device; None where nothing
    is asked.
    """
    if not definition.measurement:
        return None
    if engines:
        return partial(host.measure, engines)
    from trainables.objectives import Examiner

    return Examiner(definition.measurement, dataset).measure


def _solo() -> Any:
    """The solo backend, on a device free of what an earlier trial of this worker left there."""
    import torch

    from trainables.solo import run_trial  # heavy: loaded in the worker, once for all the trials it runs

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run_trial
