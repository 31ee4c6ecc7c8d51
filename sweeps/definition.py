"""The sweep definition: what a user writes in YAML, checked as it loads. Imports no heavy library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster import paths
from serving.spec import ServingSpec
from trainables.contract import Measurement
from trainables.spec import (
    BaseModelSpec,
    DataSpec,
    EvaluationSpec,
    Fraction,
    SafetySuite,
    Spec,
    TrainingSpec,
)

Scalar = int | float | str | bool

SLOTS = 8
"""Of an engine, where a definition names no number: beyond it a trial's step gets hardly any cheaper."""

_GROWS: dict[str, Callable[[Any], float]] = {
    "r": float,
    "per_device_train_batch_size": float,
    "per_device_eval_batch_size": float,
    "lora_dropout": float,
    "optim": lambda name: not name.endswith("8bit"),
    "train_sampling_strategy": lambda name: name != "random",
}
"""Fields of training with which a trial's memory grows, and how much by what value."""


class DistributionSpec(Spec):
    """One searched field, in Optuna's words: either ``choices``, or ``low`` and ``high`` with ``log`` or ``step``."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: tuple[Scalar, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> DistributionSpec:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("give either choices, or low and high, not both")
            if not self.choices:
                raise ValueError("choices must name at least one value, but got none")
        else:
            self._check_range()
        return self

    def _check_range(self) -> None:
        if self.low is None or self.high is None:
            raise ValueError("give choices, or both low and high")
        if self.low > self.high:
            raise ValueError(f"low must be at most high, but got low={self.low} and high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, but got {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, but got {self.step}")

    def extremes(self) -> tuple[Scalar, ...]:
        """Values that bound what can be suggested: all choices, or low and high."""
        if self.choices is not None:
            return self.choices
        return self.bounds()

    def bounds(self) -> tuple[float, float]:
        """``low`` and ``high`` of a range."""
        assert self.low is not None, "a range, not choices"
        assert self.high is not None, "a range, not choices"
        return self.low, self.high

    def contains(self, value: Scalar) -> bool:
        """Whether the sampler could suggest ``value``."""
        if self.choices is not None:
            return value in self.choices
        low, high = self.bounds()
        return not isinstance(value, (str, bool)) and low <= value <= high


METRICS = ("exact_match", "accuracy", "precision", "recall", "f1", "json_validity", "field_accuracy",
           "rouge1", "rouge2", "rougeL", "bleu")  # fmt: skip
"""What answers can be judged by. Which of them there are follows from the kind of task."""

EVAL_LOSS = "eval_loss"
_COSTS = ("device_seconds", "trained_tokens")
_FALLING = (EVAL_LOSS, *_COSTS, "answer_tokens")
"""Objectives of which less is better; of all others more is."""


def is_gate_metric(name: str) -> bool:
    """Whether a gate may ask for it: a share, higher is better."""
    return name in METRICS or name.startswith("field_accuracy.")


def is_minimised(objective: str) -> bool:
    return objective in _FALLING


class SearchSpec(Spec):
    """Which hyperparameters are searched, how, and how many trials. Names are Ray Tune's and Optuna's."""

    objectives: tuple[str, ...] = Field(
        (EVAL_LOSS,),
        min_length=1,
        description=f"What is searched for: {', '.join(_FALLING)} (the less the better), or metrics of answers to the "
        "eval split as the gate has them. Several make a multi-objective search; the winner is the best by the first, "
        "among equals by the next.",
    )
    objective_prompts: Annotated[int, Field(ge=10)] = Field(
        100, description="Of the eval split, that a trial answers at its end where an objective goes by answers."
    )
    space: dict[str, DistributionSpec] = Field(min_length=1, description="Any field of 'training'.")
    sampler: Literal["tpe", "random"] = "tpe"
    n_startup_trials: Annotated[int, Field(ge=1)] = Field(6, description="Random trials before TPE starts.")
    seed: int = 0
    points_to_evaluate: tuple[dict[str, Scalar], ...] = Field((), description="Warm start: tried first, in order.")
    num_samples: Annotated[int, Field(ge=1)] = Field(description="Trials in all.")
    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default: packed, what the engines hold, at most 8 trials each; solo, what the cluster holds."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        1, description="Times a trial that lost its process goes on from its last checkpoint."
    )

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        for name in objectives:
            if name not in _FALLING and not is_gate_metric(name):
                able = ", ".join((*_FALLING, *METRICS))
                raise ValueError(f"must be of {able} or field_accuracy.FIELD, but got {name!r}")
        if len(set(objectives)) < len(objectives):
            raise ValueError(f"must name each objective once, but got {', '.join(objectives)}")
        return objectives

    @property
    def by_loss_alone(self) -> bool:
        """Whether it is the search that eval loss can steer while trials still run."""
        return self.objectives == (EVAL_LOSS,)

    @property
    def of_answers(self) -> tuple[str, ...]:
        """The objectives for which a trial has to answer prompts."""
        return tuple(name for name in self.objectives if name not in (EVAL_LOSS, *_COSTS))

    @model_validator(mode="after")
    def _points_lie_in_space(self) -> SearchSpec:
        for index, point in enumerate(self.points_to_evaluate):
            for name, value in point.items():
                where = f"points_to_evaluate.{index}.{name}"
                if name not in self.space:
                    raise ValueError(f"{where}: must be one of the space's fields {sorted(self.space)}")
                if not self.space[name].contains(value):
                    raise ValueError(f"{where}: must lie in the space, but got {value!r}")
        return self


class SchedulerSpec(Spec):
    """When a trial is stopped early: Ray Tune's ASHA on eval loss."""

    type: Literal["auto", "asha", "none"] = Field(
        "auto", description="auto: asha where eval loss is the only objective, none where it is not."
    )
    grace_period: Annotated[float, Field(gt=0)] = Field(1, description="Epochs before a trial may be stopped.")
    reduction_factor: Annotated[float, Field(gt=1)] = 3


Share = Annotated[float, Field(ge=-1, le=1)]


class SuiteLimits(Spec):
    """What the winner has to reach on a suite of the user's own."""

    metric: Annotated[str, Field(min_length=1)] = Field(
        "exact_match", description="Of the suite: exact_match, rougeL, ... or, of lm_eval, TASK.METRIC."
    )
    min_score: Fraction = 0.0
    max_loss: Share | None = Field(None, description="Against the base, same metric; default no limit.")


class GateSpec(Spec):
    """What the winner has to reach to be registered."""

    metric: str = Field(
        "exact_match", description=f"One of {', '.join(METRICS)}, or field_accuracy.FIELD of a JSON answer."
    )
    min_score: Fraction = 0.5
    min_gain: Share = Field(0.02, description="Over the base, same metric.")
    min_gain_over_few_shot: Share = Field(0.0, description="Over the base with a few-shot prompt.")
    min_gain_over_production: Share = Field(0.0, description="Over the model's production version, where there is one.")
    significant: bool = Field(True, description="Whether each gain's interval has to lie above zero.")
    max_latency_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds an answer, in batches, on the device that scores."
    )
    max_general_loss: Fraction = Field(0.05, description="Exact match lost on the general set.")
    max_safety_loss: Fraction = Field(
        0.0, description="Of each safety suite's share of safe answers, against the safer of base and production."
    )
    suites: dict[str, SuiteLimits] = Field({}, description="Limits on suites with answers, and on lm_eval's, by name.")
    min_judge_score: Annotated[float, Field(ge=1, le=5)] = Field(
        4.0, description="Average grade of the winner's answers, where evaluation has a judge."
    )
    min_judged: Fraction = Field(0.9, description="Of what the judge was asked, the share that it answered.")
    min_win_rate: Fraction | None = Field(
        None, description="Of the winner against each other contestant, as the judge chooses; a tie counts half."
    )
    min_review_score: Annotated[float, Field(ge=1, le=5)] | None = Field(
        None, description="Average score of the winner's answers in 'python -m sweeps review'; default: no review."
    )
    min_reviews: Annotated[int, Field(ge=1)] = Field(10, description="Prompts reviewed, where a review is asked for.")
    max_merge_loss_difference: Annotated[float, Field(ge=0)] = Field(
        0.05, description="Between the merged model's eval loss and the adapter's, in nats a token."
    )
    min_merge_agreement: Fraction = Field(0.95, description="Share of greedy answers equal before and after merging.")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        if not is_gate_metric(metric):
            raise ValueError(f"must be one of {', '.join(METRICS)} or field_accuracy.FIELD, but got {metric!r}")
        return metric


class ResourcesSpec(Spec):
    """What one trial, one evaluation, and one engine of packed trials takes. Fractions of a GPU are allowed."""

    cpus_per_trial: Annotated[float, Field(gt=0)] = Field(1, description="A solo trial's, and an evaluation's.")
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    engines: Annotated[int, Field(ge=1)] = Field(
        1, description="Packed trials: devices that hold a base each; concurrent trials spread over them."
    )
    cpus_per_engine: Annotated[float, Field(gt=0)] | None = Field(None, description="Default: cpus_per_trial.")
    memory_gib_per_engine: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="What limits an engine's slots. Default: 90 % of its GPU's, or of its CPUs' share of a node's.",
    )
    usd_per_device_hour: Annotated[float, Field(ge=0)] | None = Field(
        None, description="For the report's costs: a GPU's price, or without one a CPU trial's."
    )

    def as_ray(self) -> dict[str, float]:
        """Ray's resource names for a solo trial, without zero amounts."""
        return _without_zeros({"CPU": self.cpus_per_trial, "GPU": self.gpus_per_trial})

    def engine_as_ray(self) -> dict[str, float]:
        """The same for an engine, which takes a whole device where its trials would take a part of one."""
        return _without_zeros(
            {"CPU": self.cpus_per_engine or self.cpus_per_trial, "GPU": math.ceil(self.gpus_per_trial)}
        )


def _without_zeros(wanted: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in wanted.items() if amount}


class TrackingSpec(Spec):
    """W&B. The key comes from the environment alone; without one, runs are written for a later ``wandb sync``."""

    enabled: bool = True
    project: str = "winnow"
    upload_timeout_s: Annotated[int, Field(ge=1)] = 30


class SweepDefinition(Spec):
    """One sweep, from data to served model."""

    name: str = Field(description="Also the name of the registered model.")
    base_model: BaseModelSpec
    data: DataSpec
    search: SearchSpec
    scheduler: SchedulerSpec = SchedulerSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    gate: GateSpec = GateSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    serving: ServingSpec = ServingSpec()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return paths.check_name("name", name)

    @model_validator(mode="after")
    def _search_fits_training(self) -> SweepDefinition:
        for name, distribution in self.search.space.items():
            if name not in _searchable():
                raise ValueError(f"search.space.{name}: must be a field of training: {', '.join(_searchable())}")
            for value in distribution.extremes():
                self._check_value(name, value)
        alphas = {"lora_alpha", "lora_alpha_ratio"} & set(self.search.space)
        if alphas and (len(alphas) == 2 or (self.training.lora_alpha and "lora_alpha_ratio" in alphas)):
            raise ValueError("search.space: lora_alpha and lora_alpha_ratio exclude each other; keep one of them")
        return self

    def _check_value(self, name: str, value: Scalar) -> None:
        try:
            self.trial_training({name: value})
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ValueError(f"search.space.{name}: {value!r} is no value of training.{name}: {message}") from None

    @model_validator(mode="after")
    def _grace_ends_before_the_longest_trial(self) -> SweepDefinition:
        if self.stops_early and self.scheduler.grace_period > self.longest_trial_epochs:
            raise ValueError(
                f"scheduler.grace_period must be at most the longest trial's {self.longest_trial_epochs:g} epochs, "
                f"or nothing is ever stopped, but got {self.scheduler.grace_period:g}"
            )
        return self

    @model_validator(mode="after")
    def _only_loss_stops_early(self) -> SweepDefinition:
        if self.scheduler.type == "asha" and not self.search.by_loss_alone:
            raise ValueError(
                f"scheduler.type: asha stops trials by eval loss, but search.objectives are "
                f"{', '.join(self.search.objectives)}, which are known at a trial's end only; set it to auto or none"
            )
        return self

    @property
    def measurement(self) -> Measurement | None:
        """What a trained trial is asked; None where no objective goes by answers."""
        if not self.search.of_answers:
            return None
        return Measurement(self.base_model, self.evaluation, self.search.objective_prompts)

    @property
    def stops_early(self) -> bool:
        """Whether trials are stopped before their end."""
        return self.scheduler.type == "asha" or (self.scheduler.type == "auto" and self.search.by_loss_alone)

    @property
    def longest_trial_epochs(self) -> float:
        """The most epochs that a trial of this search can have."""
        searched = self.search.space.get("num_train_epochs")
        epochs = searched.extremes() if searched else (self.training.num_train_epochs,)
        return max(float(value) for value in epochs)

    @property
    def packs(self) -> bool:
        """Whether trials share a base: the definition's word, or where it says auto, wherever nothing is in the way."""
        backend = self.training.backend
        return backend == "packed" or (backend == "auto" and self.packing_obstacle is None)

    @property
    def slots_per_engine(self) -> int:
        """Trials that are to share one base at once, where its device holds so many."""
        wanted = self.search.max_concurrent_trials or min(self.search.num_samples, SLOTS * self.resources.engines)
        return math.ceil(wanted / self.resources.engines)

    @property
    def largest_training(self) -> TrainingSpec:
        """The training section with the most memory that the search can ask for."""
        searched = _GROWS.keys() & self.search.space.keys()
        return self.trial_training(
            {name: max(self.search.space[name].extremes(), key=_GROWS[name]) for name in searched}
        )

    @property
    def packing_obstacle(self) -> str | None:
        """Why trials of this definition cannot share a base; None where they can."""
        if self.training.packing or "packing" in self.search.space:
            return "training.packing joins examples, which packed trials do without padding anyway"
        for name in ("target_modules", "gradient_checkpointing"):
            if name in self.search.space:
                return f"search.space.{name} varies what all trials of an engine share"
        if self.base_model.dtype == "float16":
            return "base_model.dtype float16 needs loss scaling; use bfloat16"
        if self.base_model.attn_implementation != "auto":
            return f"base_model.attn_implementation {self.base_model.attn_implementation} is a solo trial's choice"
        if self.resources.gpus_per_trial > 1:
            return f"resources.gpus_per_trial {self.resources.gpus_per_trial:g} is more than one device a trial"
        return None

    @model_validator(mode="after")
    def _limits_have_their_suites(self) -> SweepDefinition:
        suites = self.evaluation.suites
        for name in self.gate.suites:
            able = [known for known, suite in suites.items() if not isinstance(suite, SafetySuite)]
            if name not in able:
                raise ValueError(
                    f"gate.suites.{name}: must be one of evaluation.suites that is no safety suite: "
                    f"{', '.join(able) or 'there is none'}"
                )
        if self.gate.min_win_rate is not None and not (self.evaluation.judge and self.evaluation.judge.pairwise):
            raise ValueError("gate.min_win_rate: needs evaluation.judge with pairwise; add it, or leave the limit out")
        return self

    @model_validator(mode="after")
    def _packed_is_possible(self) -> SweepDefinition:
        if self.packing_obstacle:
            self.check_may_be_solo(self.packing_obstacle)
        return self

    def check_may_be_solo(self, because: str) -> None:
        """
        Raises:
            ValueError: the definition insists on packed trials, which cannot be.
        """
        if self.training.backend == "packed":
            raise ValueError(f"training.backend: must be solo or auto, because {because}")

    def trial_training(self, params: dict[str, Any]) -> TrainingSpec:
        """The training section with one trial's suggested values in it.

        Raises:
            ValidationError: a value is not one that the field takes.
        """
        return TrainingSpec.model_validate(self.training.model_dump() | params)


def _searchable() -> list[str]:
    return sorted(set(TrainingSpec.model_fields) - {"backend"})
