"""Scores of the contestants: loss over labelled tokens, and what their greedy answers are worth."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from trainables import base, generation, metrics
from trainables.answers import kind_of
from trainables.data import snapshot
from trainables.data.chat import prompt_ids
from trainables.data.formats import Messages
from trainables.data.suites import Suite
from trainables.generation import Generate, Model
from trainables.metrics import DOMAIN, GENERAL, Answer, Answered, Scores
from trainables.spec import BaseModelSpec, EvaluationSpec

Rows = Sequence[dict[str, Any]]

_LOGITS = 2**28
"""That a pass makes at most, unless one row has more: in 16 bits and in 32 they take 1.6 GB, where 16 rows of 2,048
tokens and a vocabulary of 128,256 would take 25.
"""


def score_base(
    spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec, suites: Sequence[Suite] = ()
) -> dict[str, Scores]:
    """The base, and, where ``evaluation.few_shot`` is not 0, the same with a few examples before each prompt.

    A few-shot prompt is what fine-tuning has to beat; it is asked the test split and suites with answers alone.
    """
    contestant, data = Model(spec), snapshot.load(Path(dataset))
    loaded, tokenizer = [contestant.load()], contestant.tokenizer()
    loss = mean_loss(loaded[0], tokenizer, data.rows("test"), evaluation.batch_size)
    asked = [suite for suite in suites if suite.kind == "answers"]
    shots = few_shot(loaded[0], tokenizer, data, evaluation, asked)
    generate = _generator(contestant, loaded, tokenizer, evaluation)
    found = {"base": _scores(generate, tokenizer, data, evaluation, suites, loss)}
    if shots:
        sets = {DOMAIN: _domain(generate, tokenizer, data, shots)}
        sets |= {suite.name: _suite(generate, tokenizer, suite, shots) for suite in asked}
        measured = metrics.measure_sets(sets, evaluation.json_fields)
        found["few_shot"] = Scores(measured, sets, len(shots), generate.engine)
    return found


def score_adapter(
    spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec, suites: Sequence[Suite], adapter: str
) -> Scores:
    """The base with an adapter in PEFT's format."""
    return _score(Model(spec, adapter=adapter), dataset, evaluation, suites)


def score_merged(
    spec: BaseModelSpec, dataset: str, evaluation: EvaluationSpec, suites: Sequence[Suite], directory: str
) -> Scores:
    """A registered version's merged weights, as they are served, with the tokenizer that is served beside them.

    It may have grown from another base; where its tokens are others than the snapshot's, it has no loss.
    """
    contestant = Model(spec, merged=directory)
    same_tokens = contestant.tokenizer().get_vocab() == base.load_tokenizer(spec).get_vocab()
    return _score(contestant, dataset, evaluation, suites, same_tokens)


def _score(
    contestant: Model, dataset: str, evaluation: EvaluationSpec, suites: Sequence[Suite], with_loss: bool = True
) -> Scores:
    data, tokenizer, loaded = snapshot.load(Path(dataset)), contestant.tokenizer(), [contestant.load()]
    loss = mean_loss(loaded[0], tokenizer, data.rows("test"), evaluation.batch_size) if with_loss else None
    return _scores(_generator(contestant, loaded, tokenizer, evaluation), tokenizer, data, evaluation, suites, loss)


def _generator(contestant: Model, loaded: list[Any], tokenizer: Any, evaluation: EvaluationSpec) -> Generate:
    """What answers for the contestant. vLLM loads it by itself: ``loaded`` is let go of before."""
    if not generation.takes_vllm(contestant, evaluation, loaded[0]):
        return generation.with_transformers(loaded[0], tokenizer, evaluation)
    loaded.clear()
    return generation.with_vllm(contestant, evaluation)


def _scores(
    generate: Generate,
    tokenizer: Any,
    data: snapshot.Snapshot,
    evaluation: EvaluationSpec,
    suites: Sequence[Suite],
    loss: float | None,
) -> Scores:
    """
    ``loss`` is the mean negative log likelihood, in nats, of the test split's labelled tokens; ``perplexity`` its
    exponential; the others are the metrics of what the contestant was asked, by ``metrics.measure_sets``.
    """
    general = answer(generate, tokenizer, data.rows("general"))
    sets = {DOMAIN: _domain(generate, tokenizer, data)}
    sets |= {GENERAL: Answered("general", general)} if general else {}
    sets |= {suite.name: _suite(generate, tokenizer, suite) for suite in suites}
    measured = {} if loss is None else {"loss": round(loss, 6), "perplexity": round(math.exp(min(loss, 50)), 6)}
    measured |= metrics.measure_sets(sets, evaluation.json_fields)
    return Scores(measured, sets, generated_by=generate.engine)


def _domain(generate: Generate, tokenizer: Any, data: snapshot.Snapshot, shots: Sequence[Messages] = ()) -> Answered:
    return _answered(answer(generate, tokenizer, data.rows("test"), shots))


def _answered(answers: list[Answer]) -> Answered:
    return Answered(kind_of([one.expected for one in answers]), answers)


def _suite(generate: Generate, tokenizer: Any, suite: Suite, shots: Sequence[Messages] = ()) -> Answered:
    answers = respond(generate, tokenizer, suite.conversations, shots)
    if suite.kind == "safety":
        judged = zip(answers, suite.rules, strict=True)
        return Answered("safety", [replace(one, safe=rule.holds(one.answer)) for one, rule in judged])
    return _answered(answers)


def few_shot(
    model: Any, tokenizer: Any, data: snapshot.Snapshot, evaluation: EvaluationSpec, suites: Sequence[Suite] = ()
) -> list[Messages]:
    """Examples of the training split to stand before each prompt, as turns of the conversation.

    They come from files that the test split has examples of too, drawn by seed; as many as the model's positions hold
    beside the longest prompt and its answer.
    """
    test, able = snapshot.answered(data.rows("test")), of_test_files(data, "train")
    chosen = random.Random(evaluation.seed).sample(able, min(evaluation.few_shot, len(able)))
    asked = [row["messages"] for row in test] + [one for suite in suites for one in suite.conversations]
    longest = max(len(prompt_ids(tokenizer, messages)) for messages in asked) + evaluation.max_new_tokens
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    shots: list[Messages] = []
    for row in chosen:
        turns = [message for message in row["messages"] if message["role"] != "system"]
        longest += len(prompt_ids(tokenizer, [*turns, {"role": "user", "content": ""}]))
        if longest > room:
            break
        shots.append(turns)
    return shots


def of_test_files(data: snapshot.Snapshot, split: str) -> list[dict[str, Any]]:
    """Rows of a split with answers, from files that the test split has such rows of."""

    def file(row: dict[str, Any]) -> str:
        return row["source"].rpartition(":")[0]

    files = {file(row) for row in snapshot.answered(data.rows("test"))}
    return [row for row in snapshot.answered(data.rows(split)) if file(row) in files]


def _with_shots(messages: Messages, shots: Sequence[Messages]) -> Messages:
    """Shots come after what the system says."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    return [*system, *(turn for shot in shots for turn in shot), *messages[len(system) :]]


@torch.inference_mode()
def mean_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Mean cross entropy, in nats, over all labelled tokens of ``rows``, each token weighing the same."""
    total, count, rows = 0.0, 0, sorted(rows, key=lambda row: len(row["input_ids"]))
    if rows:
        logits_of_one = len(rows[-1]["input_ids"]) * model.config.get_text_config().vocab_size
        batch_size = max(1, min(batch_size, _LOGITS // logits_of_one))
    for batch in _batches(rows, batch_size):
        ids, attention, labels = _padded(batch, tokenizer.pad_token_id, model.device)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def answer(generate: Generate, tokenizer: Any, rows: Rows, shots: Sequence[Messages] = ()) -> list[Answer]:
    """Greedy answers to each row's last user turn, in the rows' order; rows without an answer are passed over."""
    return respond(generate, tokenizer, [row["messages"] for row in snapshot.answered(rows)], shots)


def respond(
    generate: Generate, tokenizer: Any, conversations: Sequence[Messages], shots: Sequence[Messages] = ()
) -> list[Answer]:
    """Greedy answers to conversations, each up to its prompt or up to the answer that should come."""
    made = generate([prompt_ids(tokenizer, _with_shots(messages, shots)) for messages in conversations])
    return [
        Answer(*_asked(messages), one.text, one.tokens, one.seconds)
        for messages, one in zip(conversations, made, strict=True)
    ]


def _asked(messages: Messages) -> tuple[str, str]:
    """The prompt, and the answer that should come; none where the prompt is the end.

    Of a longer conversation all turns are the prompt: who judges an answer has to see what it answers.
    """
    answered = messages[-1]["role"] == "assistant"
    *before, last = messages[:-1] if answered else messages
    turns = [f"{turn['role']}: {turn['content']}" for turn in (*before, last)] if before else [last["content"]]
    return "\n\n".join(turns), messages[-1]["content"] if answered else ""


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
