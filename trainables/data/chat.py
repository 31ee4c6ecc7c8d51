"""Messages to tokens by the tokenizer's own chat template, with the tokens that are trained marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainables.data.formats import Messages


@dataclass(frozen=True)
class Encoded:
    """One conversation: ``input_ids`` and ``assistant_masks`` (1: the assistant says it), both of length T."""

    input_ids: list[int]
    assistant_masks: list[int]
    full_length: int

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


def prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The conversation up to where the assistant's last message begins: what is generated from."""
    opening = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    encoded = tokenizer.apply_chat_template(opening, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])
