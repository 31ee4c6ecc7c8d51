"""A LoRA adapter apart from who trains it: which layers it has, how it starts, and PEFT's files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from trainables.spec import TARGET_MODULES, TrainingSpec

WEIGHTS = "adapter_model.safetensors"
Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, d_in] and B [d_out, r] of one layer: it computes ``x A' B' * lora_alpha / r``."""


_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that a block gives the same input, by transformers' usual names."""


@dataclass(frozen=True)
class Target:
    """A linear layer of the base that an adapter adds to."""

    name: str
    d_in: int
    d_out: int

    @property
    def group(self) -> tuple[str, ...]:
        """The same for layers that are given one input."""
        parent, _, own = self.name.rpartition(".")
        return next(((parent, *names) for names in _ONE_INPUT if own in names), (self.name,))


def groups(layers: Sequence[Target]) -> list[list[Target]]:
    """Neighbours with one input, together; in the order of ``layers``."""
    return [list(members) for _, members in itertools.groupby(layers, key=lambda layer: layer.group)]


def targets(model: PreTrainedModel, preset: str) -> list[Target]:
    """The layers that peft would take for a preset of ``target_modules``, in the model's order."""
    wanted, head = TARGET_MODULES[preset], model.get_output_embeddings()
    return [
        Target(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (wanted == "all-linear" or name.rsplit(".", 1)[-1] in wanted)
    ]


def initial_weights(layers: list[Target], r: int, seed: int) -> dict[str, Pair]:
    """peft's initialisation (Kaiming uniform A, zero B) drawn from the trial's seed and the layer's place alone."""
    pairs: dict[str, Pair] = {}
    for place, layer in enumerate(layers):
        a = torch.empty(r, layer.d_in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=_generator(seed, place))
        pairs[layer.name] = (a, torch.zeros(layer.d_out, r))
    return pairs


def config(training: TrainingSpec) -> LoraConfig:
    return LoraConfig(
        r=training.r,
        lora_alpha=training.alpha,  # type: ignore[arg-type]
        lora_dropout=training.lora_dropout,
        target_modules=TARGET_MODULES[training.target_modules],
        bias="none",
        task_type="CAUSAL_LM",
    )


def save(directory: Path, pairs: dict[str, Pair], training: TrainingSpec, base_name: str) -> None:
    """A directory that stock peft loads, and that serving engines take: layers by name, not as a word of peft's."""
    directory.mkdir(parents=True, exist_ok=True)
    described = config(training)
    described.target_modules = sorted({name.rsplit(".", 1)[-1] for name in pairs})
    described.base_model_name_or_path, described.inference_mode = base_name, True
    described.save_pretrained(str(directory))
    tensors = {}
    for name, (a, b) in pairs.items():
        for letter, weight in (("A", a), ("B", b)):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = weight.detach().cpu().contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load(directory: Path, layers: list[Target]) -> dict[str, Pair]:
    """What ``save`` wrote, or peft."""
    stored = load_file(directory / WEIGHTS)
    key = "base_model.model.{}.lora_{}.weight"
    return {layer.name: (stored[key.format(layer.name, "A")], stored[key.format(layer.name, "B")]) for layer in layers}


def _generator(*key: int) -> torch.Generator:
    """Random numbers that depend on ``key`` alone."""
    return torch.Generator().manual_seed(int(numpy.random.SeedSequence(key).generate_state(1, numpy.uint64)[0]))
