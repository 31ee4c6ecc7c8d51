"""Merging an adapter into 16-bit weights, and the proof that merging changed nothing that counts.

The adapter was trained over the dequantised NF4 base, and whether to merge into that or into the 16-bit original is
disputed. Winnow merges into the original, which serves better where the adapter generalises, records that choice, and
lets the parity check decide each time: the merged model has to answer as the adapter did.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trainables import base, metrics, scoring
from trainables.data import snapshot
from trainables.generation import with_transformers
from trainables.spec import BaseModelSpec, EvaluationSpec

MERGED_INTO = "16-bit base"


@dataclass(frozen=True)
class Parity:
    """The merged model against the adapter over the base it was trained on, on the eval split.

    ``loss_difference`` is absolute, in nats a token; ``agreement`` the share of equal greedy answers.
    """

    adapter_loss: float
    merged_loss: float
    loss_difference: float
    agreement: float
    prompts: int
    merged_into: str = MERGED_INTO

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(spec: BaseModelSpec, adapter: str, target: str) -> None:
    """Write the merged model, bfloat16 safetensors, and its tokenizer to the directory ``target``."""
    model: Any = base.with_adapter(base.load_model(spec, quantized=False), adapter)
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        layer.get_base_layer().float()  # added up in 32 bits, a layer at a time: a whole base of 32 would not fit
        layer.merge(safe_merge=True)
        layer.get_base_layer().to(torch.bfloat16)
    merged = model.unload().to(torch.bfloat16)
    merged.config.dtype = torch.bfloat16
    merged.save_pretrained(target, safe_serialization=True)
    base.load_tokenizer(spec).save_pretrained(target)


def check_parity(
    spec: BaseModelSpec, adapter: str, merged: str, dataset: str, evaluation: EvaluationSpec, prompts: int = 64
) -> Parity:
    """Ask the adapter and the merged model on disk the same ``prompts`` of the eval split."""
    tokenizer = base.load_tokenizer(spec)
    rows = snapshot.load(Path(dataset)).rows("eval")[:prompts]
    with_adapter: Any = base.with_adapter(base.load_model(spec), adapter).eval()
    adapter_loss = scoring.mean_loss(with_adapter, tokenizer, rows, evaluation.batch_size)
    adapter_answers = scoring.answer(with_transformers(with_adapter, tokenizer, evaluation), tokenizer, rows)
    del with_adapter
    alone = base.load_merged(spec, merged)
    merged_loss = scoring.mean_loss(alone, tokenizer, rows, evaluation.batch_size)
    merged_answers = scoring.answer(with_transformers(alone, tokenizer, evaluation), tokenizer, rows)
    return Parity(
        adapter_loss=round(adapter_loss, 6),
        merged_loss=round(merged_loss, 6),
        loss_difference=round(abs(merged_loss - adapter_loss), 6),
        agreement=metrics.agreement(adapter_answers, merged_answers),
        prompts=len(rows),
    )


def merge_and_check(spec: BaseModelSpec, adapter: str, target: str, dataset: str, evaluation: EvaluationSpec) -> Parity:
    """``merge`` into ``target``, then ``check_parity`` of what was written there."""
    merge(spec, adapter, target)
    return check_parity(spec, adapter, target, dataset, evaluation)
