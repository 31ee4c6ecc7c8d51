"""What a user may say about the base, the data, a trial's training and its evaluation: strict, frozen, no heavy import.

Fields keep the names of the library that they configure: transformers', peft's, trl's.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    """One part of the data: a file, a directory of files, or a dataset on a hub."""

    path: str = Field(
        description="A JSONL or Parquet file, a directory of them, or a hub dataset's id such as 'org/name'. Rows are "
        "chat, alpaca, prompt/completion or plain text, detected per file. '${WINNOW_HOME}' is replaced."
    )
    name: str | None = Field(None, description="Of a hub dataset: its configuration, as datasets names it.")
    revision: str | None = Field(None, description="Of a hub dataset: branch, tag or commit; required.")
    split: str = Field("train", description="Of a hub dataset: which of its splits is read.")
    splits: Literal["all", "train", "train_eval"] = Field(
        "all",
        description="'train' keeps the source out of the eval and test splits, 'train_eval' out of test alone: as for "
        "general examples mixed in, with a share in eval so that the search sees what a trial forgets.",
    )
    tag: Annotated[str, Field(min_length=1)] = Field(
        "domain", description="What kind of data it is, as 'general' or 'synthetic'; limits in 'shares' go by it."
    )
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Weighted sources stand to one another as their weights, in the largest mixture that repeats no "
        "example. A source without one keeps all its examples.",
    )
    max_examples: Annotated[int, Field(ge=1)] | None = Field(
        None, description="At most so many, drawn by data.seed, before weights count."
    )


class ShareSpec(Spec):
    """Limits on a tag's share of the training split, by examples."""

    min: Fraction = 0
    max: Fraction = 1

    @model_validator(mode="after")
    def _in_order(self) -> ShareSpec:
        if self.min > self.max:
            raise ValueError(f"min must be at most max, but got min={self.min:g} and max={self.max:g}")
        return self


Entity = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "NATIONAL_ID", "API_KEY"]
Region = Literal["AU", "CA", "DE", "ES", "FI", "FR", "GB", "IN", "IT", "KR", "PL", "SE", "SG", "TH", "TR", "US"]


class PersonalDataSpec(Spec):
    """What is done about personal data and secrets in the examples."""

    action: Literal["off", "report", "redact", "reject"] = Field(
        "report",
        description="report counts; redact puts placeholders such as <EMAIL_ADDRESS_1>, in one example the same for "
        "the same value; reject leaves the example out.",
    )
    entities: tuple[Entity, ...] = Field(get_args(Entity), min_length=1)
    regions: tuple[Region, ...] = Field(
        ("US", "GB", "DE", "FR", "ES", "IT"),
        description="Countries whose national ids, and whose phone numbers without a country code, are looked for.",
    )


class DataSpec(Spec):
    """Where examples come from, what they have to be, and how they are mixed and split."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    general: str | None = Field(
        None,
        description="Held-out general instructions, a file or a directory: what fine-tuning must not make worse.",
    )
    task_prefixes: dict[str, str] = Field(
        {}, description="What stands before the prompt of rows with that 'task'. Default: '[TASK] ' for every task."
    )
    wrong_rows: Literal["error", "drop"] = Field(
        "error", description="Rows that break their format's rules stop the run, or are left out and counted."
    )
    personal_data: PersonalDataSpec = PersonalDataSpec()
    shares: dict[str, ShareSpec] = Field({}, description="By tag, as {general: {min: 0.05}, synthetic: {max: 0.3}}.")
    min_examples: Annotated[int, Field(ge=3)] = Field(
        200, description="Fewer distinct examples than this stop the run; fewer than 500 are a warning."
    )
    eval_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: int = 0
    max_length: Annotated[int, Field(ge=8)] = Field(
        1024, description="Tokens; longer examples are cut and reported, plain text goes on in the next row."
    )
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.85, description="Jaccard similarity of 5-character shingles from which two examples count as one."
    )

    @model_validator(mode="after")
    def _limits_name_tags(self) -> DataSpec:
        tags = {source.tag for source in self.sources}
        for tag in self.shares:
            if tag not in tags:
                raise ValueError(f"shares.{tag}: must be a tag of a source, one of {', '.join(sorted(tags))}")
        return self


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
    """How the contestants are scored after the search: base, base with a few-shot prompt, winner, production."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    json_fields: tuple[str, ...] | None = Field(
        None, description="Keys that a valid JSON answer has, all and no other; None: any JSON object is valid."
    )
    few_shot: Annotated[int, Field(ge=0)] = Field(
        3, description="Examples before each prompt of the few-shot base; 0 leaves that contestant out."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="Of the intervals of gains, from a paired bootstrap over the test split's prompts."
    )
    resamples: Annotated[int, Field(ge=100)] = 2000
    seed: int = 0
