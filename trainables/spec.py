"""What a user may say about the base, the data, a trial's training and its evaluation: strict, frozen, no heavy import.

Fields keep the names of the library that they configure: transformers', peft's, trl's.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster import paths
from cluster.entities import ENTITIES, REGIONS, Entity, Region

SamplingStrategy = Literal["random", "group_by_length"]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression, but {pattern!r} is none: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""

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


class PersonalDataSpec(Spec):
    """What is done about personal data and secrets in the examples."""

    action: Literal["off", "report", "redact", "reject"] = Field(
        "report",
        description="report counts; redact puts placeholders such as <EMAIL_ADDRESS_1>, in one example the same for "
        "the same value; reject leaves the example out.",
    )
    entities: tuple[Entity, ...] = Field(ENTITIES, min_length=1)
    regions: tuple[Region, ...] = Field(
        REGIONS,
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


class AnswersSuite(Spec):
    """Prompts of the user's own with the answers that should come, in any format that sources have."""

    kind: Literal["answers"]
    path: str = Field(description="A JSONL or Parquet file, or a directory of them. '${WINNOW_HOME}' is replaced.")


class SafetySuite(Spec):
    """Prompts that must be refused, or answered without what is forbidden. Rules judge, and the judge where asked to.

    A row has ``prompt`` (or ``messages``), ``must`` (``refuse`` or ``answer``), and may have ``forbidden`` and
    ``required``, lists of regular expressions that an answer must not, and must, contain.
    """

    kind: Literal["safety"]
    path: str = Field(description="A JSONL or Parquet file, or a directory of them. '${WINNOW_HOME}' is replaced.")
    refusals: tuple[Pattern, ...] = Field(
        (), description="Regular expressions by which an answer is a refusal, beside those that Winnow knows."
    )
    judge: bool = Field(False, description="Whether evaluation.judge has to call an answer safe, too.")


class HarnessSuite(Spec):
    """Tasks of lm-evaluation-harness, for the base, the winner once it is merged, and production."""

    kind: Literal["lm_eval"]
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, description="As lm-eval names them.")
    include_path: str | None = Field(None, description="A directory with task files of your own.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Default: the task's own.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents of each task; default all.")
    apply_chat_template: bool = Field(False, description="Whether documents are asked as a chat.")


SuiteSpec = Annotated[AnswersSuite | SafetySuite | HarnessSuite, Field(discriminator="kind")]

OWN_SETS = ("domain", "general")
"""What every evaluation has without being named: the test split and ``data.general``."""

_TAKEN = (*OWN_SETS, "field_accuracy")
"""Names with which a metric of a suite would be called as another one is."""


class JudgeSpec(Spec):
    """A model that judges answers, behind an HTTP endpoint. Its key comes from the environment alone."""

    provider: Literal["openai", "anthropic"] = Field(
        "openai", description="openai: any endpoint that speaks OpenAI's chat completions; anthropic: its messages."
    )
    model: Annotated[str, Field(min_length=1)]
    base_url: str | None = Field(None, description="Default: the provider's own.")
    api_key_env: str | None = Field(
        None,
        description="Environment variable with the key. Default: OPENAI_API_KEY or ANTHROPIC_API_KEY; an endpoint on "
        "this machine needs none.",
    )
    rubric: Annotated[str, Field(min_length=1)] = (
        "5: right and complete, nothing to add or remove. 4: right, with a flaw that its reader would not mind. "
        "3: right in part. 2: mostly wrong or of little use. 1: wrong, empty or beside the point."
    )
    pairwise: bool = Field(True, description="Whether the winner's answers are also held against each other's.")
    max_examples: Annotated[int, Field(ge=1)] = Field(100, description="Prompts judged, the same for every contestant.")
    max_calls: Annotated[int, Field(ge=1)] = Field(2000, description="In one evaluation; cached answers are no calls.")
    max_spend_usd: Annotated[float, Field(gt=0)] | None = Field(None, description="Needs the prices below.")
    usd_per_million_input_tokens: Annotated[float, Field(ge=0)] | None = None
    usd_per_million_output_tokens: Annotated[float, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=16)] = Field(400, description="Of the judge's own answer.")
    request: dict[str, Any] = Field(
        {}, description="More keys of each request; for openai temperature is 0 unless said here. null leaves one out."
    )
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(3, description="At an answer that is not the JSON asked for.")
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    timeout_s: Annotated[float, Field(gt=0)] = 60

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_it(cls, base_url: str | None) -> str | None:
        if base_url is None:
            return None
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"must be an http or https address, but got {base_url!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("must hold no name, password or query: keys come from the environment (api_key_env)")
        return base_url

    @model_validator(mode="after")
    def _spend_can_be_counted(self) -> JudgeSpec:
        prices = (self.usd_per_million_input_tokens, self.usd_per_million_output_tokens)
        if self.max_spend_usd is not None and None in prices:
            raise ValueError(
                "max_spend_usd needs usd_per_million_input_tokens and usd_per_million_output_tokens to be counted by"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine."""
        return self.base_url is not None and urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")

    @property
    def key_name(self) -> str:
        """The environment variable that the key comes from."""
        return self.api_key_env or f"{self.provider.upper()}_API_KEY"


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
    generation: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="What answers prompts. auto: vLLM where it is installed; transformers for a 4-bit base on a CPU, "
        "on a part of a GPU, and where the 16-bit weights take most of a GPU.",
    )
    suites: dict[str, SuiteSpec] = Field(
        {}, description="By name: more prompts for the contestants, beside the test split and the general set."
    )
    judge: JudgeSpec | None = None

    @model_validator(mode="after")
    def _suites_are_named_apart(self) -> EvaluationSpec:
        for name, suite in self.suites.items():
            paths.check_name(f"suites: {name!r}", name)
            if name in _TAKEN:
                raise ValueError(f"suites.{name}: must not be one of {', '.join(_TAKEN)}: Winnow has those")
            if isinstance(suite, SafetySuite) and suite.judge and self.judge is None:
                raise ValueError(f"suites.{name}.judge: needs evaluation.judge; add it, or leave safety to the rules")
        return self

    @property
    def judged_safety(self) -> tuple[str, ...]:
        """Safety suites whose answers the judge is asked about, too."""
        return tuple(name for name, suite in self.suites.items() if isinstance(suite, SafetySuite) and suite.judge)

    @property
    def harness(self) -> dict[str, HarnessSuite]:
        """The suites that lm-evaluation-harness runs."""
        return {name: suite for name, suite in self.suites.items() if isinstance(suite, HarnessSuite)}

    @property
    def asked(self) -> dict[str, AnswersSuite | SafetySuite]:
        """The suites whose prompts contestants answer."""
        return {name: suite for name, suite in self.suites.items() if not isinstance(suite, HarnessSuite)}
