"""The ``solo`` backend: one trial in one process, TRL's SFTTrainer on a PEFT adapter over the frozen base.

The same code runs on CPU and GPU. Adapter weights stay in 32 bit over a 4-bit base: SFTTrainer would round them to
bfloat16, which costs accuracy for a few megabytes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from cluster import files
from trainables import base, lora
from trainables.contract import (
    ADAPTER,
    REPORT,
    Report,
    ReportFunction,
    TrialConfig,
    TrialFailure,
    evaluation_steps,
    seal,
    shared_step,
    steps_per_epoch,
)
from trainables.data import snapshot
from trainables.order import epoch_order
from trainables.spec import TrainingSpec


def run_trial(config: TrialConfig, workdir: Path, resume_from: Path | None, report: ReportFunction) -> None:
    """Train one adapter to the end of its schedule, reporting every evaluation with a checkpoint.

    Args:
        workdir: scratch space of this trial alone.
        resume_from: a checkpoint that an earlier attempt reported; training goes on from its evaluation.

    Raises:
        TrialFailure: out of memory, or a loss that is no finite number.
    """
    with base.oom_is_a_result():
        _Trial(config, workdir, resume_from, report).run()


class _Trial:
    """One attempt at a trial: the trainer, and what its reports add up."""

    def __init__(self, config: TrialConfig, workdir: Path, resume_from: Path | None, report: ReportFunction) -> None:
        self.config, self.workdir, self.report_to = config, workdir, report
        self.resume_from = _restore(resume_from, workdir)
        data = snapshot.load(Path(config.dataset))
        self.examples = data.count("train")
        progress = files.read_json(workdir / REPORT) if self.resume_from else {}
        self.best = progress.get("best_eval_loss", math.inf)
        self.seconds_before = progress.get("seconds", 0.0)
        self.started = time.monotonic()
        self.trainer = self._trainer(data)
        self.trainer.trained_tokens = progress.get("trained_tokens", 0)

    def run(self) -> None:
        checkpoint = get_last_checkpoint(str(self.workdir)) if self.resume_from else None
        self.trainer.train(resume_from_checkpoint=checkpoint)

    def _trainer(self, data: snapshot.Snapshot) -> _CountingTrainer:
        training = self.config.training
        self.model = model = _adapted_model(self.config)
        weights = {name: value.data for name, value in model.named_parameters() if value.requires_grad}
        callbacks: list[TrainerCallback] = [_Schedule(self)]
        if training.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
        trainer = _CountingTrainer(
            model=model,
            args=_arguments(self.config, self.workdir, data.manifest["settings"]["max_length"]),
            train_dataset=_dataset(data, "train"),
            eval_dataset=_dataset(data, "eval"),
            processing_class=base.load_tokenizer(self.config.base_model),
            callbacks=callbacks,
        )
        trainer.training = training
        for name, value in model.named_parameters():
            if name in weights:  # back from SFTTrainer's bfloat16
                value.data = weights[name]
        return trainer

    def evaluated(self, eval_loss: float) -> None:
        """Called with each evaluation's loss; refuses one that is no number before anything else sees it."""
        if not math.isfinite(eval_loss):
            raise TrialFailure("nan", f"eval loss is {eval_loss} at step {self.trainer.state.global_step}")
        if eval_loss < self.best:
            self.best = eval_loss
            self.model.save_pretrained(str(self.workdir / ADAPTER))

    def saved(self, eval_loss: float) -> None:
        """Called once the state after an evaluation is on disk: reports it, with the checkpoint to go on from."""
        epoch = self.trainer.state.epoch or 0.0
        train_loss = self.trainer.mean_loss_since_last_call()
        if not math.isfinite(train_loss):
            raise TrialFailure("nan", f"training loss is {train_loss} at step {self.trainer.state.global_step}")
        seconds = self.seconds_before + time.monotonic() - self.started
        made = Report(
            eval_loss=eval_loss,
            step=shared_step(epoch, self.examples, self.config.reference_batch),
            epoch=round(epoch, 6),
            trained_tokens=self.trainer.trained_tokens,
            train_loss=train_loss,
            seconds=seconds,
            device_seconds=seconds,
            best_eval_loss=self.best,
        )
        files.write_json(self.workdir / REPORT, made.as_dict())
        self.report_to(made, self._checkpoint())

    def _checkpoint(self) -> Path:
        """Hands out the trainer's last state and the best adapter as one directory."""
        last = get_last_checkpoint(str(self.workdir))
        assert last is not None
        handed = self.workdir / "handed-out"
        shutil.rmtree(handed, ignore_errors=True)
        shutil.copytree(last, handed / Path(last).name)
        shutil.copytree(self.workdir / ADAPTER, handed / ADAPTER)
        shutil.copy2(self.workdir / REPORT, handed / REPORT)
        seal(handed)
        return handed


def _restore(checkpoint: Path | None, workdir: Path) -> Path | None:
    if checkpoint is not None:
        shutil.copytree(checkpoint, workdir, dirs_exist_ok=True)
    return checkpoint


def _adapted_model(config: TrialConfig) -> PeftModel:
    """The base with a fresh adapter whose initial weights depend on the trial's seed alone."""
    model = base.load_model(config.base_model)
    if config.base_model.quantization == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    set_seed(config.training.seed)
    layers = lora.targets(model, config.training.target_modules)
    adapted = get_peft_model(model, lora.config(config.training))
    for name, (a, _) in lora.initial_weights(layers, config.training.r, config.training.seed).items():
        adapted.get_parameter(f"base_model.model.{name}.lora_A.default.weight").data.copy_(a)
    return adapted


def _dataset(data: snapshot.Snapshot, split: str) -> Dataset:
    """Tokens as trl takes them when it need not prepare them itself."""
    return Dataset.from_parquet(str(data.directory / f"{split}.parquet")).select_columns(["input_ids", "labels"])


def _arguments(config: TrialConfig, workdir: Path, max_length: int) -> SFTConfig:
    training, dtype = config.training, base.compute_dtype(config.base_model)
    return SFTConfig(
        output_dir=str(workdir),
        learning_rate=training.learning_rate,
        num_train_epochs=training.num_train_epochs,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        packing=training.packing,
        gradient_checkpointing=training.gradient_checkpointing,
        seed=training.seed,
        max_length=max_length,  # of a packed row; the snapshot has cut examples to it
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,
        eval_strategy="steps",  # EarlyStoppingCallback insists; _Schedule says when
        eval_steps=10**9,
        restore_callback_states_from_checkpoint=True,
        save_strategy="no",
        logging_strategy="no",
        save_total_limit=1,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
    )


class _CountingTrainer(SFTTrainer):
    """SFTTrainer in the trial's own data order, with losses over tokens and a count of those it has learned from."""

    training: TrainingSpec
    trained_tokens = 0
    _losses: list[torch.Tensor]
    _evaluated: list[tuple[torch.Tensor, int]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.trained_tokens += _learned(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("_losses", []).append(loss)
        return loss

    def mean_loss_since_last_call(self) -> float:
        """Mean over optimizer steps; with accumulation transformers hands out each part already divided."""
        losses = self.__dict__.pop("_losses", [])
        steps = max(1, len(losses) // self.args.gradient_accumulation_steps)
        return float(torch.stack(losses).sum()) / steps if losses else math.nan

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated.append((found[0], _learned(inputs)))
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the mean over tokens: its mean over batches depends on how they fall."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        total = sum(float(loss) * count for loss, count in self._evaluated)
        assert output.metrics is not None
        output.metrics["eval_loss"] = total / sum(count for _, count in self._evaluated)
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset
        return _Order([len(ids) for ids in dataset["input_ids"]], self.training)


class _Order(Sampler[int]):
    """``epoch_order`` as the data loader takes it; accelerate calls ``set_epoch``."""

    def __init__(self, lengths: list[int], training: TrainingSpec) -> None:
        self.lengths, self.training, self.epoch = lengths, training, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        training = self.training
        strategy, batch = training.train_sampling_strategy, training.effective_batch
        return iter(epoch_order(self.lengths, batch, strategy, training.seed, self.epoch))


def _learned(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are predicted and count in the loss."""
    return int((inputs["labels"][:, 1:] != -100).sum())


class _Schedule(TrainerCallback):
    """Evaluates and saves at the trial's evaluation steps, and hands both on."""

    def __init__(self, trial: _Trial) -> None:
        self.trial, self.steps, self.eval_loss = trial, set[int](), math.nan

    def on_train_begin(self, args, state, control, **kwargs):
        training = self.trial.config.training
        an_epoch = state.max_steps / training.num_train_epochs
        if not training.packing:  # the exact number, where the trainer's own batches are the snapshot's examples
            an_epoch = steps_per_epoch(self.trial.examples, training.effective_batch)
        self.steps = {
            *evaluation_steps(round(an_epoch), training.num_train_epochs, training.evals_per_epoch),
            state.max_steps,
        }

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert metrics is not None
        self.eval_loss = metrics["eval_loss"]
        self.trial.evaluated(self.eval_loss)

    def on_save(self, args, state, control, **kwargs):
        self.trial.saved(self.eval_loss)
