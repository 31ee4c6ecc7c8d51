"""Scores of the contestants: loss over labelled tokens, and what their greedy answers are worth."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from trainables import base, metrics
from trainables.answers import kind_of
from trainables.data import snapshot
from trainables.data.chat import prompt_ids
from trainables.data.formats import Messages
from trainables.metrics import Answer, Scores
from trainables.spec import BaseModelSpec, EvaluationSpec

Rows = Sequence[dict[str, Any]]


def score_base(spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec) -> dict[str, Scores]:
    """The base, and, where ``evaluation.few_shot`` is not 0, the same with a few examples before each prompt.

    A few-shot prompt is what fine-tuning has to beat; it is asked the test split alone.
    """
    model, tokenizer, data = base.load_model(spec), base.load_tokenizer(spec), snapshot.load(Path(dataset))
    contestants = {"base": score_model(model, tokenizer, data, evaluation)}
    if shots := few_shot(model, tokenizer, data, evaluation):
        test = data.rows("test")
        answers = answer(model, tokenizer, test, evaluation, shots)
        kind = contestants["base"].kind
        measured = metrics.measure(kind, answers, evaluation.json_fields)
        contestants["few_shot"] = Scores(kind, measured, answers, shots=len(shots))
    return contestants


def score_adapter(spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec, adapter: str) -> Scores:
    """The base with an adapter in PEFT's format."""
    model = PeftModel.from_pretrained(base.load_model(spec), adapter).eval()
    return score_model(model, base.load_tokenizer(spec), snapshot.load(Path(dataset)), evaluation)


def score_merged(spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec, directory: str) -> Scores:
    """A registered version's merged weights, as they are served, with the tokenizer that is served beside them.

    It may have grown from another base; where its tokens are others than the snapshot's, it has no loss.
    """
    own, tokenizer = base.load_tokenizer(BaseModelSpec(model_name_or_path=directory)), base.load_tokenizer(spec)
    model, data = base.load_merged(spec, directory), snapshot.load(Path(dataset))
    return score_model(model, own, data, evaluation, own.get_vocab() == tokenizer.get_vocab())


def score_model(
    model: Any, tokenizer: Any, data: snapshot.Snapshot, evaluation: EvaluationSpec, with_loss: bool = True
) -> Scores:
    """A model that is loaded already.

    ``loss`` is the mean negative log likelihood, in nats, of the test split's labelled tokens; ``perplexity`` its
    exponential; ``general_exact_match`` the share of right answers on the general set; the others are the metrics of
    the test split's kind of task.
    """
    test, general = data.rows("test"), data.rows("general")
    loss = mean_loss(model, tokenizer, test, evaluation.batch_size) if with_loss else None
    answers = answer(model, tokenizer, test, evaluation)
    general_answers = answer(model, tokenizer, general, evaluation)
    kind = kind_of([one.expected for one in answers])
    measured = {} if loss is None else {"loss": round(loss, 6), "perplexity": round(math.exp(min(loss, 50)), 6)}
    measured |= metrics.measure(kind, answers, evaluation.json_fields)
    if general_answers:
        measured["general_exact_match"] = metrics.exact_match(general_answers)
    return Scores(kind, measured, answers, general_answers)


def few_shot(model: Any, tokenizer: Any, data: snapshot.Snapshot, evaluation: EvaluationSpec) -> list[Messages]:
    """Examples of the training split to stand before each prompt, as turns of the conversation.

    They come from files that the test split has examples of too, drawn by seed; as many as the model's positions hold
    beside the longest prompt and its answer.
    """
    test = snapshot.answered(data.rows("test"))
    files = {_file(row) for row in test}
    able = [row for row in snapshot.answered(data.rows("train")) if _file(row) in files]
    chosen = random.Random(evaluation.seed).sample(able, min(evaluation.few_shot, len(able)))
    longest = max(len(prompt_ids(tokenizer, row["messages"])) for row in test) + evaluation.max_new_tokens
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    shots: list[Messages] = []
    for row in chosen:
        turns = [message for message in row["messages"] if message["role"] != "system"]
        longest += len(prompt_ids(tokenizer, [*turns, {"role": "user", "content": ""}]))
        if longest > room:
            break
        shots.append(turns)
    return shots


def _file(row: dict[str, Any]) -> str:
    return row["source"].rpartition(":")[0]


def _with_shots(messages: Messages, shots: Sequence[Messages]) -> Messages:
    """Shots come after what the system says."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    return [*system, *(turn for shot in shots for turn in shot), *messages[len(system) :]]


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
def answer(
    model: Any, tokenizer: Any, rows: Rows, evaluation: EvaluationSpec, shots: Sequence[Messages] = ()
) -> list[Answer]:
    """Greedy answers to each row's last user turn, in the rows' order; rows without an answer are passed over."""
    rows = snapshot.answered(rows)
    prompts = [prompt_ids(tokenizer, _with_shots(row["messages"], shots)) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    made: dict[int, Answer] = {}
    for batch in _batches(order, evaluation.batch_size):
        started = time.perf_counter()
        generated = _generate(model, tokenizer, [prompts[index] for index in batch], evaluation.max_new_tokens)
        seconds = (time.perf_counter() - started) / len(batch)
        for index, tokens in zip(batch, generated, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            prompt, expected = (message["content"] for message in rows[index]["messages"][-2:])
            count = int((tokens != tokenizer.pad_token_id).sum())
            made[index] = Answer(prompt, expected, text, count, round(seconds, 4))
    return [made[index] for index in range(len(rows))]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> torch.Tensor:
    """Greedy tokens after each prompt, [prompts, longest answer]."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    made = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return made[:, inputs["input_ids"].shape[1] :]


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
