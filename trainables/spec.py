"""What a user may say about the base, the data, a trial's training and its evaluation: strict, frozen, no heavy import.

Fields keep the names of the library that they configure: transformers', peft's, trl's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SamplingStrategy = Literal["random", "group_by_length"]
Fraction = Annotated[float, Field(ge=0, le=1)]

TARGET_MODULES: dict[str, str | list[str]] = {
    "all-linear": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "attention-qv": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
"""Named presets: a list cannot be a choice in Optuna's storage, and a name can be compared in W&B."""


class Spec(BaseModel):
    """Base of every section: unknown keys are errors, no value is coerced from another type, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseModelSpec(Spec):
    """The frozen model that adapters train on."""

    model_name_or_path: str = Field(
        description="A local directory ('${WINNOW_HOME}' is replaced), or a hub id such as 'org/model'."
    )
    revision: str | None = Field(None, description="Branch, tag or commit; required for a hub id.")
    quantization: Literal["nf4", "none"] = Field("nf4", description="bitsandbytes 4-bit NormalFloat, or 16-bit.")
    bnb_4bit_use_double_quant: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute type; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto takes flash attention on a GPU where it is installed, otherwise sdpa."
    )
    trust_remote_code: bool = False


class SourceSpec(Spec):
    """One file of examples."""

    path: str = Field(description="JSONL, chat or alpaca, detected per file. '${WINNOW_HOME}' is replaced.")
    splits: Literal["all", "train", "train_eval"] = Field(
        "all",
        description="'train' keeps the file out of the eval and test splits, 'train_eval' out of test alone: as for "
        "general examples mixed in, with a share in eval so that the search sees what a trial forgets.",
    )


class DataSpec(Spec):
    """Where examples come from and how they are split."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    general: str | None = Field(
        None, description="JSONL of held-out general instructions: what fine-tuning must not make worse."
    )
    eval_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: int = 0
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="Tokens; longer examples are cut and reported.")
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.85, description="Jaccard similarity of 5-character shingles from which two examples count as one."
    )


class TrainingSpec(Spec):
    """One trial's hyperparameters. Every field of it but ``backend`` may be searched."""

    backend: Literal["auto", "packed", "solo"] = Field(
        "auto",
        description="packed: trials share one frozen base; solo: each its own process. auto: packed where it applies.",
    )
    r: Annotated[int, Field(ge=1, le=512)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="Default: lora_alpha_ratio * r.")
    lora_alpha_ratio: Annotated[float, Field(gt=0)] = 2.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear", "attention", "attention-qv", "mlp"] = "all-linear"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = Field(
        8, description="Speed alone; no loss depends on it."
    )
    train_sampling_strategy: SamplingStrategy = Field(
        "random", description="group_by_length: batches of similar length, in random order; less padding."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="Share of the trial's own steps.")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    packing: bool = Field(False, description="trl's best-fit packing of examples into max_length.")
    completion_only_loss: bool = Field(True, description="Train on the assistant's tokens alone.")
    gradient_checkpointing: bool = False
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Evaluations without a better eval loss after which a trial ends by itself."
    )
    evals_per_epoch: Annotated[int, Field(ge=1, le=100)] = 2
    seed: int = 0

    @property
    def effective_batch(self) -> int:
        """Examples in one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def alpha(self) -> float:
        """peft's ``lora_alpha``, given or from the ratio."""
        return self.lora_alpha if self.lora_alpha is not None else self.lora_alpha_ratio * self.r


class EvaluationSpec(Spec):
    """How the winner and the base are scored after the search."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    json_fields: tuple[str, ...] | None = Field(
        None, description="Keys that a valid JSON answer has, all and no other; None: any JSON object is valid."
    )
