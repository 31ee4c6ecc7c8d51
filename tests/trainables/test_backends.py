"""The trial contract: one suite that every backend passes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from trainables import base, packed, scoring, solo
from trainables.contract import ADAPTER, Report, TrialConfig, TrialFailure, is_whole
from trainables.data import snapshot
from trainables.data.snapshot import Snapshot
from trainables.spec import BaseModelSpec, TrainingSpec

BACKENDS: dict[str, Callable] = {"solo": solo.run_trial, "packed": packed.run_trial}
Collected = list[tuple[Report, Path]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Callable:
    return BACKENDS[request.param]


@pytest.fixture
def trial(tiny: BaseModelSpec, tickets: Snapshot) -> Callable[..., TrialConfig]:
    def make(**training) -> TrialConfig:
        values = {"r": 4, "learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16}
        return TrialConfig("t0000", tiny, TrainingSpec(**values | training), str(tickets.directory), 16)

    return make


def run(backend: Callable, config: TrialConfig, scratch: Path, resume_from: Path | None = None) -> Collected:
    """All reports of a trial, with a copy of each checkpoint."""
    reports: Collected = []

    def keep(report: Report, checkpoint: Path) -> None:
        kept = scratch / f"checkpoint-{len(reports)}"
        shutil.copytree(checkpoint, kept)
        reports.append((report, kept))

    workdir = scratch / "work"
    workdir.mkdir(parents=True)
    backend(config, workdir, resume_from, keep)
    return reports


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / ADAPTER / "adapter_model.safetensors")


def test_it_reports_every_evaluation_on_the_shared_axis(backend, trial, tmp_path: Path) -> None:
    config = trial()
    reports = [report for report, _ in run(backend, config, tmp_path)]
    data = snapshot.load(Path(config.dataset))
    total = data.manifest["splits"]["train"]["trained_tokens"]
    assert [report.epoch for report in reports] == pytest.approx([0.5, 1.0, 1.5, 2.0], abs=0.1)
    assert [report.step for report in reports] == sorted({report.step for report in reports})
    assert reports[-1].trained_tokens == 2 * total
    assert reports[-1].eval_loss < reports[0].eval_loss
    assert reports[-1].best_eval_loss == min(report.eval_loss for report in reports)


def test_its_adapter_scores_the_same_under_stock_peft(backend, trial, tmp_path: Path) -> None:
    config = trial()
    report, checkpoint = run(backend, config, tmp_path)[-1]
    model = PeftModel.from_pretrained(base.load_model(config.base_model), checkpoint / ADAPTER).eval()
    rows = snapshot.load(Path(config.dataset)).rows("eval")
    loss = scoring.mean_loss(model, base.load_tokenizer(config.base_model), rows, 16)
    assert loss == pytest.approx(report.best_eval_loss, rel=1e-3)


def test_equal_configs_give_equal_trials_and_another_seed_does_not(backend, trial, tmp_path: Path) -> None:
    first, again = (weights(run(backend, trial(), tmp_path / name)[-1][1]) for name in "ab")
    other = weights(run(backend, trial(seed=1), tmp_path / "c")[-1][1])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_it_goes_on_from_its_last_evaluation(backend, trial, tmp_path: Path) -> None:
    whole = run(backend, trial(), tmp_path / "whole")
    assert is_whole(whole[1][1])
    rest = run(backend, trial(), tmp_path / "rest", resume_from=whole[1][1])
    assert [report.step for report, _ in rest] == [report.step for report, _ in whole[2:]]
    for (resumed, _), (straight, _) in zip(rest, whole[2:], strict=True):
        assert resumed.eval_loss == pytest.approx(straight.eval_loss, rel=0.01)
        assert resumed.trained_tokens == straight.trained_tokens
    assert rest[-1][0].seconds > whole[1][0].seconds


def test_from_its_last_checkpoint_there_is_nothing_left_to_do(backend, trial, tmp_path: Path) -> None:
    config = trial(num_train_epochs=1)
    whole = run(backend, config, tmp_path / "whole")
    assert run(backend, config, tmp_path / "rest", resume_from=whole[-1][1]) == []


def test_a_loss_that_is_no_number_is_a_failure_with_that_reason(backend, trial, tmp_path: Path) -> None:
    with pytest.raises(TrialFailure) as failure:
        run(backend, trial(learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0), tmp_path)
    assert failure.value.reason == "nan"


def test_out_of_memory_is_a_failure_with_that_reason(backend, trial, tmp_path: Path, monkeypatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(base, "load_model", no_memory)
    with pytest.raises(TrialFailure) as failure:
        run(backend, trial(), tmp_path)
    assert failure.value.reason == "oom"


def test_patience_ends_a_trial_that_stops_learning(backend, trial, tmp_path: Path) -> None:
    config = trial(learning_rate=1e-12, num_train_epochs=6, evals_per_epoch=1, early_stopping_patience=1)
    reports = run(backend, config, tmp_path)
    assert len(reports) < 6
    assert math.isfinite(reports[-1][0].eval_loss)
    assert [report.last for report, _ in reports] == [False] * (len(reports) - 1) + [backend is packed.run_trial]


def test_accumulation_makes_the_same_steps(backend, trial, tmp_path: Path) -> None:
    one = run(backend, trial(), tmp_path / "one")
    two = run(backend, trial(per_device_train_batch_size=8, gradient_accumulation_steps=2), tmp_path / "two")
    assert [report.step for report, _ in one] == [report.step for report, _ in two]
    assert two[-1][0].eval_loss == pytest.approx(one[-1][0].eval_loss, rel=0.01)
    assert two[-1][0].train_loss == pytest.approx(one[-1][0].train_loss, rel=0.05)


def test_the_eval_loss_does_not_depend_on_the_eval_batch(backend, trial, tmp_path: Path) -> None:
    single, ten = (
        run(backend, trial(num_train_epochs=0.5, per_device_eval_batch_size=size), tmp_path / str(size))[-1][0]
        for size in (1, 10)
    )
    assert single.eval_loss == pytest.approx(ten.eval_loss, rel=1e-5)


OPTIONS = {
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True},
    "dropout": {"lora_dropout": 0.2},
    "modules": {"target_modules": "attention-qv", "lora_alpha": 8.0},
    "schedule": {"lr_scheduler_type": "linear", "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_ratio": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_learns_under_every_option(options: dict, backend, trial, tmp_path: Path) -> None:
    reports = run(backend, trial(**options), tmp_path)
    assert reports[-1][0].eval_loss < reports[0][0].eval_loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_on_a_gpu_it_trains_in_bfloat16_over_nf4(backend, trial, tmp_path: Path) -> None:
    reports = run(backend, trial(optim="paged_adamw_8bit", gradient_checkpointing=True), tmp_path)
    assert reports[-1][0].eval_loss < reports[0][0].eval_loss
