"""Make the tiny base model: ``python scripts/make_tiny_base.py --out DIR [--steps 1300] [--seed 0]``.

Trains a Llama of about a million parameters with its own BPE tokenizer on the general instructions of
``tiny_world.py``, from code-made text alone, and saves an ordinary Hugging Face directory. Under two minutes on two
cores. The steps are counted, not timed, so that a slow machine makes the same model.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from tiny_world import CLOSINGS, ISSUES, NAMES, OPENINGS, PRODUCTS, URGENCY_SIGNS, WORDS, chat, general_example

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY, BATCH, PEAK_LR = 1536, 32, 3e-3
COPIES = 16  # of a batch, in the first half of training
Row = tuple[list[int], list[int]]


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template that marks what the assistant generates."""
    rng = random.Random(seed)
    general = [part for _ in range(20_000) for part in general_example(rng)]
    sentences = [wording.format(p=product) for _, _, ways in ISSUES for wording in ways for product in PRODUCTS]
    signs = [sign for signs in URGENCY_SIGNS.values() for sign in signs]
    small_talk = [*OPENINGS, *CLOSINGS, *NAMES, *signs]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*general, *sentences * 5, *small_talk * 20, *WORDS * 300, *(f" {word}" for word in WORDS * 300)], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Random weights, wider than Llama's: at this width its 0.02 delays the heads that copy by a thousand steps."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def encode_general(tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int) -> list[Row]:
    """General instructions in tokens, with the answer's tokens marked."""
    conversations = [chat(*general_example(rng))["messages"] for _ in range(count)]
    encoded = tokenizer.apply_chat_template(conversations, return_dict=True, return_assistant_tokens_mask=True)
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def encode_copies(tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int) -> list[Row]:
    """Runs of tokens drawn from the whole vocabulary, asked and answered as in a chat.

    They form the heads that copy within a few hundred steps, and let the base produce every token there is.
    """
    _, user, assistant = tokenizer.convert_tokens_to_ids(ROLES)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ordinary = range(assistant + 1, len(tokenizer))
    runs = [rng.sample(ordinary, rng.randint(3, 12)) for _ in range(count)]
    return [([bos, user, *run, end, assistant, *run, end], [0] * (len(run) + 4) + [1] * (len(run) + 1)) for run in runs]


def batch(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, labels and position_ids, each [lines, longest]; marked tokens alone are labelled.

    Examples lie one behind another in lines as long as the longest of them: a line for each would be half padding.
    transformers sees by the positions where one begins, and lets none look at another.
    """
    longest = max(len(ids) for ids, _ in rows)
    lines: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row[0]), reverse=True):
        fitting = (line for line in lines if sum(len(ids) for ids, _ in [*line, row]) <= longest)
        if line := next(fitting, None):
            line.append(row)
        else:
            lines.append([row])
    ids = torch.full((len(lines), longest), pad)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, line in enumerate(lines):
        start = 0
        for tokens, mask in line:
            place = (index, slice(start, start := start + len(tokens)))
            ids[place] = torch.tensor(tokens)
            labels[place] = torch.where(torch.tensor(mask) == 1, ids[place], -100)
            positions[place] = torch.arange(len(tokens))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """AdamW with a short warm-up and a linear fall to zero; progress on standard output."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(1.0, (step + 1) / 50) * (1 - step / steps)
        copies = COPIES if step < steps // 2 else 0
        rows = encode_general(tokenizer, rng, BATCH - copies) + encode_copies(tokenizer, rng, copies)
        loss = model(**batch(rows, tokenizer.pad_token_id), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d} of {steps}  loss {loss.item():.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Whole or not at all: a temporary name beside ``out``, then a rename."""
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    logging.disable_progress_bar()  # a base of four megabytes
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, must not exist")
    parser.add_argument("--steps", type=int, default=1300, help="training steps (default 1300)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out must not exist, but {arguments.out} does; remove it or name another directory")
    tokenizer = make_tokenizer(arguments.seed)
    model = make_model(tokenizer, arguments.seed)
    print(f"tiny base: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, arguments.steps, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, arguments.out)
    print(f"{arguments.out}: saved")
