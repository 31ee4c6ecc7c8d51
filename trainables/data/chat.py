"""Conversations and plain texts to tokens: by the tokenizer's own chat template, trained tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trainables.data.formats import Messages


@dataclass(frozen=True)
class Encoded:
    """One row of a snapshot: ``input_ids`` and ``assistant_masks`` (1: the assistant says it), both of length T."""

    input_ids: list[int]
    assistant_masks: list[int]
    full_length: int
    """Tokens of the example before it was cut; of plain text, of this row alone, for nothing of it is cut."""

    def labels(self, completion_only: bool) -> list[int]:
        """``input_ids`` where a token is learned, -100 elsewhere."""
        if not completion_only:
            return self.input_ids
        return [token if said else -100 for token, said in zip(self.input_ids, self.assistant_masks, strict=True)]

    @property
    def was_cut(self) -> bool:
        return self.full_length > len(self.input_ids)


def check_template(tokenizer: Any, completion_only: bool) -> None:
    """The tokenizer can say which tokens are the assistant's.

    Raises:
        ValueError: it has no chat template, or one without ``{% generation %}`` where the loss needs it.
    """
    if not tokenizer.chat_template:
        raise ValueError("base_model: its tokenizer has no chat template; choose an instruct model or add a template")
    if completion_only and "{% generation" not in tokenizer.chat_template.replace("{%-", "{%"):
        raise ValueError(
            "base_model: its chat template has no {% generation %} markers, which training.completion_only_loss "
            "needs to know the assistant's tokens; add them around the assistant's content, or set it to false"
        )


def encode(tokenizer: Any, conversations: Sequence[Messages], max_length: int) -> list[Encoded]:
    """Every conversation in tokens, cut at ``max_length``."""
    if not conversations:
        return []
    marked = "{% generation" in tokenizer.chat_template.replace("{%-", "{%")
    batch = tokenizer.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
    )
    rows = batch["input_ids"]
    masks = batch["assistant_masks"] if marked else [[1] * len(ids) for ids in rows]
    return [
        Encoded(list(ids[:max_length]), list(mask[:max_length]), len(ids))
        for ids, mask in zip(rows, masks, strict=True)
    ]


def encode_plain(tokenizer: Any, text: str, max_length: int) -> list[Encoded]:
    """A text and an end token, in as many rows as it takes; every token of it is learned.

    Each row begins with the tokenizer's own first token where it has one, for a model never sees a text without it.
    """
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = max_length - len(first)
    rows = [[*first, *ids[start : start + room]] for start in range(0, len(ids), room)]
    return [Encoded(row, [0] * len(first) + [1] * (len(row) - len(first)), len(row)) for row in rows]


def marked_text(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """A row as text again, in runs, each with whether its tokens are learned; the first token never is."""
    learned = [False, *(label != -100 for label in labels[1:])]
    runs = groupby(zip(input_ids, learned, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), is_learned) for is_learned, run in runs]


def prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The conversation up to where the assistant's last message begins: what is generated from."""
    opening = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    encoded = tokenizer.apply_chat_template(opening, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])
