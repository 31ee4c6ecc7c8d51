"""One trial in a shared engine: its adapter, optimizer, schedule and place in its own data. Nothing is shared."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from cluster import files
from trainables import lora
from trainables.adapters import Adapter, GroupWeights, grouped
from trainables.contract import (
    ADAPTER,
    REPORT,
    Report,
    TrialConfig,
    evaluation_steps,
    seal,
    shared_step,
    steps_per_epoch,
)
from trainables.lora import Pair, Target
from trainables.order import epoch_order
from trainables.packing import Example
from trainables.spec import TrainingSpec

_STATE, _TENSORS = "slot.json", "slot.safetensors"
_DROPOUT = 0x64726F70
"""Before the key of a mask, and nobody's seed: weights are drawn by seed and layer, and a key's last zeros are lost."""


@dataclass
class Progress:
    """What a trial has done so far: all of it that a checkpoint keeps besides tensors."""

    step: int = 0
    trained_tokens: int = 0
    best_eval_loss: float | None = None
    """None before the first evaluation."""
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Training loss of each step since the last report."""


class Slot:
    """The state of one trial.

    Args:
        dtype: that passes compute in; the weights themselves are kept in 32 bits.

    All weights lie in one 32-bit vector, and gradients and moments likewise: the optimizer, the norm and a checkpoint
    are then one operation each, whatever the number of layers.
    """

    def __init__(
        self,
        config: TrialConfig,
        layers: Sequence[Target],
        lengths: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        training = self.training = config.training
        self.config, self.layers, self.lengths = config, list(layers), lengths
        size = sum(training.r * (layer.d_in + layer.d_out) for layer in layers)
        self.vector = torch.zeros(size, device=device)
        self.vector.grad = torch.zeros_like(self.vector)
        self.pairs, self.group_gradients = self._views(self.vector), self._groups(self.vector.grad)
        self.set_weights(lora.initial_weights(self.layers, training.r, training.seed))
        self.computing = self.vector if dtype is torch.float32 else self.vector.to(dtype)
        self.group_weights = self._groups(self.computing)
        self.best = self.vector.clone()
        self.optimizer = _optimizer(self.vector, training)
        self.progress, self.started = Progress(), time.monotonic()
        self.steps_an_epoch = steps_per_epoch(len(lengths), training.effective_batch)
        self.total_steps = max(1, math.ceil(training.num_train_epochs * self.steps_an_epoch))
        self.evaluates_at = set(
            evaluation_steps(self.steps_an_epoch, training.num_train_epochs, training.evals_per_epoch)
        )
        self._rate = _schedule(training, self.total_steps)
        self._order: tuple[int, list[int]] = (-1, [])  # of the epoch that it is in

    @property
    def trial_id(self) -> str:
        return self.config.trial_id

    @property
    def ended(self) -> bool:
        patience = self.training.early_stopping_patience
        tired = patience is not None and self.progress.evaluations_without_gain >= patience
        return tired or self.progress.step >= self.total_steps

    @property
    def due(self) -> bool:
        """Whether an evaluation follows the step just made."""
        return self.progress.step in self.evaluates_at

    def set_weights(self, pairs: dict[str, Pair]) -> None:
        for layer, (a, b) in zip(self.layers, self.pairs, strict=True):
            a.copy_(pairs[layer.name][0])
            b.copy_(pairs[layer.name][1])

    def weights(self, vector: torch.Tensor | None = None) -> dict[str, Pair]:
        pairs = self._views(self.vector if vector is None else vector)
        return {layer.name: pair for layer, pair in zip(self.layers, pairs, strict=True)}

    def adapter(self, micro_batch: int | None) -> Adapter:
        """As a pass takes it; without a ``micro_batch`` for evaluation."""
        training = self.training
        if self.computing is not self.vector:
            self.computing.copy_(self.vector)
        learns = micro_batch is not None
        dropout = training.lora_dropout if learns else 0.0
        return Adapter(
            vector=self.computing,
            gradient=self.vector.grad if learns else None,
            weights=self.group_weights,
            gradients=self.group_gradients,
            layers=self.layers,
            r=training.r,
            scale=training.alpha / training.r / (1 - dropout),
            dropout=dropout,
            key=(_DROPOUT, training.seed, self.progress.step, micro_batch or 0),
        )

    def micro_batches(self) -> list[list[int]]:
        """Indices of the examples of the next step, in the batches whose gradients add up to it."""
        training, size = self.training, self.training.per_device_train_batch_size
        epoch, place = divmod(self.progress.step, self.steps_an_epoch)
        batch = training.effective_batch
        if self._order[0] != epoch:
            strategy, seed = training.train_sampling_strategy, training.seed
            self._order = epoch, epoch_order(self.lengths, batch, strategy, seed, epoch)
        step = self._order[1][place * batch : (place + 1) * batch]
        return [step[start : start + size] for start in range(0, len(step), size)]

    def clear(self) -> None:
        assert self.vector.grad is not None
        self.vector.grad.zero_()

    def clip(self) -> torch.Tensor:
        """The gradient's norm, and the gradient cut to ``max_grad_norm``; waits for no device."""
        return torch.nn.utils.clip_grad_norm_([self.vector], self.training.max_grad_norm)

    def update(self, loss: float, tokens: int, norm: float) -> bool:
        """One optimizer step with the gradients at hand; False, and nothing changed, where they are no numbers."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * self._rate(self.progress.step)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.trained_tokens += tokens
        self.progress.losses.append(loss)
        return True

    def evaluated(self, eval_loss: float, examples: int) -> Report:
        """Take note of an evaluation; what to report of it."""
        progress, losses = self.progress, self.progress.losses
        best = progress.best_eval_loss
        if best is None or eval_loss < best:
            best = progress.best_eval_loss = eval_loss
            progress.evaluations_without_gain = 0
            self.best.copy_(self.vector)
        else:
            progress.evaluations_without_gain += 1
        self._count_seconds()
        progress.losses = []
        epoch = progress.step / self.steps_an_epoch
        return Report(
            eval_loss=eval_loss,
            step=shared_step(epoch, examples, self.config.reference_batch),
            epoch=round(epoch, 6),
            trained_tokens=progress.trained_tokens,
            train_loss=sum(losses) / len(losses),
            seconds=progress.seconds,
            device_seconds=progress.device_seconds,
            best_eval_loss=best,
            last=self.ended,
        )

    def export(self, directory: Path) -> None:
        """The adapter of the best evaluation, in PEFT's format."""
        base_name = self.config.base_model.model_name_or_path
        lora.save(directory, self.weights(self.best), self.training, base_name)

    def save(self, directory: Path, report: Report | None = None) -> None:
        """A checkpoint by the trial contract: the best adapter, the report, and all that the next step depends on.

        Between two reports there is none to write: such a one is for another engine to go on from, not for the sweep.
        """
        directory.mkdir(parents=True)
        self._count_seconds()
        self.export(directory / ADAPTER)
        moments = {f"optimizer.{name}": value for name, value in self._optimizer_state().items()}
        save_file({"vector": self.vector} | moments, directory / _TENSORS)
        files.write_json(directory / _STATE, vars(self.progress))
        if report:
            files.write_json(directory / REPORT, report.as_dict())
        seal(directory)

    def restore(self, directory: Path) -> None:
        tensors = load_file(directory / _TENSORS)
        with torch.no_grad():
            self.vector.copy_(tensors.pop("vector"))
        state = {name.removeprefix("optimizer."): value for name, value in tensors.items()}
        counts = self.training.optim != "adamw_torch"  # bitsandbytes does so in Python
        self.optimizer.state[self.vector] = {
            name: int(value) if counts and not value.dim() else value.to(self.vector.device)
            for name, value in state.items()
        }
        self.progress = Progress(**json.loads((directory / _STATE).read_text(encoding="utf-8")))
        for mine, (a, b) in zip(
            self._views(self.best), lora.load(directory / ADAPTER, self.layers).values(), strict=True
        ):
            mine[0].copy_(a)
            mine[1].copy_(b)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.progress.seconds, self.started = self.progress.seconds + now - self.started, now

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state[self.vector]
        return {name: torch.as_tensor(value) for name, value in state.items()}

    def _groups(self, vector: torch.Tensor) -> list[GroupWeights]:
        return grouped(vector, self.layers, self.training.r)

    def _views(self, vector: torch.Tensor) -> list[Pair]:
        """A [r, d_in] and B [d_out, r] of each layer."""
        return [
            (a, b_t.t())
            for group in self._groups(vector)
            for a, b_t in zip(group.a.split(self.training.r), group.b_t, strict=True)
        ]


def examples_of(rows: Sequence[dict[str, Any]]) -> list[Example]:
    return [Example(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]


def _optimizer(vector: torch.Tensor, training: TrainingSpec) -> Any:
    """transformers' optimizers by its names and with its defaults, over one parameter.

    What is ``paged`` is not: bitsandbytes never gives such memory back, so each trial would leave some, and an engine's
    memory model counts the moments anyway.
    """
    common: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": training.weight_decay,
    }
    if training.optim == "adamw_torch":
        return torch.optim.AdamW([vector], fused=True, **common)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if training.optim.endswith("8bit") else bitsandbytes.optim.AdamW32bit
    return kind([vector], **common)


def _schedule(training: TrainingSpec, total_steps: int) -> Any:
    """transformers' own factor on the learning rate, by step: a function without state."""
    warmup = math.ceil(total_steps * training.warmup_ratio)
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(training.lr_scheduler_type, placeholder, warmup, total_steps).lr_lambdas[0]
