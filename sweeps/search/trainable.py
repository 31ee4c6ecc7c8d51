"""The function that Ray Tune runs for each trial: a backend between Tune's session and the trial contract."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Checkpoint

from sweeps.definition import SweepDefinition
from trainables import host
from trainables.contract import Report, TrialConfig, TrialFailure


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
    run_trial = partial(host.run_trial, engines) if engines else _solo()
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
        try:
            run_trial(trial, Path(workdir), Path(checkpoint) if checkpoint else None, _report)
        except TrialFailure as failure:
            tune.report({"failure_reason": failure.reason, "failure_message": failure.message})


def _report(report: Report, checkpoint: Path) -> None:
    tune.report(report.as_dict(), checkpoint=Checkpoint.from_directory(checkpoint))


def _solo() -> Any:
    """The solo backend, on a device free of what an earlier trial of this worker left there."""
    import torch

    from trainables.solo import run_trial  # heavy: loaded in the worker, once for all the trials it runs

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run_trial
