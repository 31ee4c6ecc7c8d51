"""Scores of a model: loss and perplexity over labelled tokens, exact match and JSON validity of greedy answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from trainables import base
from trainables.data import snapshot
from trainables.data.chat import prompt_ids
from trainables.spec import BaseModelSpec, EvaluationSpec


@dataclass(frozen=True)
class Answer:
    """What was asked, what should have come, what came."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Scores:
    """A contestant on the test split, and on the general set where there is one."""

    metrics: dict[str, float]
    answers: list[Answer]
    general_answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(
    spec: BaseModelSpec,
    dataset: str,
    evaluation: EvaluationSpec,
    adapter: str | None,
    log: Callable[[str], None] = lambda _: None,
) -> Scores:
    """The base, or the base with an adapter, on the snapshot in ``dataset``.

    ``loss`` is the mean negative log likelihood, in nats, of the test split's labelled tokens; ``perplexity`` its
    exponential; ``exact_match`` and ``json_validity`` shares of greedy answers; ``general_exact_match`` the same on
    the general set.
    """
    model: Any = base.load_model(spec)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return score_model(model, base.load_tokenizer(spec), snapshot.load(Path(dataset)), evaluation, log)


def score_model(
    model: Any,
    tokenizer: Any,
    data: snapshot.Snapshot,
    evaluation: EvaluationSpec,
    log: Callable[[str], None] = lambda _: None,
) -> Scores:
    """``score`` of a model that is loaded already."""
    test, general = data.rows("test"), data.rows("general")
    loss = mean_loss(model, tokenizer, test, evaluation.batch_size)
    log(f"answering {len(test)} test and {len(general)} general prompts")
    answers = answer(model, tokenizer, test, evaluation)
    general_answers = answer(model, tokenizer, general, evaluation)
    metrics = {
        "loss": round(loss, 6),
        "perplexity": round(math.exp(min(loss, 50)), 6),
        "exact_match": exact_match(answers),
        "json_validity": json_validity(answers, evaluation.json_fields),
    }
    if general_answers:
        metrics["general_exact_match"] = exact_match(general_answers)
    return Scores(metrics, answers, general_answers)


@torch.inference_mode()
def mean_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Mean cross entropy, in nats, over all labelled tokens of ``rows``, each token weighing the same."""
    total, count = 0.0, 0
    for batch in _batches(sorted(rows, key=lambda row: len(row["input_ids"])), batch_size):
        ids, attention, labels = _padded(batch, tokenizer.pad_token_id, model.device)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], evaluation: EvaluationSpec) -> list[Answer]:
    """Greedy answers to each row's last user turn, in the rows' order; rows without an answer are passed over."""
    rows = [row for row in rows if row["messages"] and row["messages"][-1]["role"] == "assistant"]
    prompts = [prompt_ids(tokenizer, row["messages"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    texts: dict[int, str] = {}
    for batch in _batches(order, evaluation.batch_size):
        inputs = tokenizer.pad(
            {"input_ids": [prompts[index] for index in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        made = model.generate(
            **inputs,
            max_new_tokens=evaluation.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for index, tokens in zip(batch, made[:, inputs["input_ids"].shape[1] :], strict=True):
            texts[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return [
        Answer(row["messages"][-2]["content"], row["messages"][-1]["content"], texts[index])
        for index, row in enumerate(rows)
    ]


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to what was expected, white space at both ends aside."""
    if not answers:
        return 0.0
    return round(sum(one.answer.strip() == one.expected.strip() for one in answers) / len(answers), 6)


def json_validity(answers: Sequence[Answer], fields: Sequence[str] | None) -> float:
    """Share of answers that are a JSON object, with exactly ``fields`` as keys where they are given."""
    if not answers:
        return 0.0
    return round(sum(_is_valid_json(one.answer, fields) for one in answers) / len(answers), 6)


def agreement(left: Sequence[Answer], right: Sequence[Answer]) -> float:
    """Share of prompts to which two models gave the same answer."""
    pairs = list(zip(left, right, strict=True))
    return round(sum(one.answer == other.answer for one, other in pairs) / len(pairs), 6) if pairs else 1.0


def _is_valid_json(text: str, fields: Sequence[str] | None) -> bool:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and (fields is None or set(value) == set(fields))


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _padded(
    rows: Sequence[dict[str, Any]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels, each [rows, longest], padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        attention[index, :length] = 1
    return ids.to(device), attention.to(device), labels.to(device)
