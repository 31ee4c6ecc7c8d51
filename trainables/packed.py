"""The ``packed`` backend for one trial alone: the shared engine with one slot, behind the trial contract."""

from __future__ import annotations

from pathlib import Path

from trainables import base
from trainables.contract import ReportFunction, TrialConfig, TrialFailure
from trainables.data import snapshot
from trainables.engine import Engine, Failed


def run_trial(config: TrialConfig, workdir: Path, resume_from: Path | None, report: ReportFunction) -> None:
    """Train one adapter to the end of its schedule; as ``solo.run_trial``.

    Raises:
        TrialFailure: out of memory, or a loss that is no finite number.
    """
    training = config.training
    with base.oom_is_a_result():
        engine = Engine(
            config.base_model,
            snapshot.load(Path(config.dataset)),
            training.target_modules,
            capacity=1,
            gradient_checkpointing=training.gradient_checkpointing,
        )
        if engine.admit(config, resume_from).ended:  # its last report was all that was left to make
            return
    while engine.slots:
        for event in engine.advance():
            if isinstance(event, Failed):
                raise TrialFailure(event.reason, event.message)
            checkpoint = workdir / f"step-{event.report.step}"
            event.slot.save(checkpoint, event.report)
            report(event.report, checkpoint)
