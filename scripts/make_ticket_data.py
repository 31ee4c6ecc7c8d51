"""Make the tickets data set: ``python scripts/make_ticket_data.py --out DIR [--rows 1250] [--seed 0]``.

Writes three chat JSONL files. ``tickets.jsonl``: support tickets in, strict JSON out, and a few planted
near-duplicates for the data stage to find. ``general-train.jsonl``: general examples to mix into training, since a
small model forgets without them. ``general-test.jsonl``: held-out ones, on which the gate measures what was forgotten.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tiny_world import (
    CLOSINGS,
    FIELDS,
    ISSUES,
    NAMES,
    OPENINGS,
    PRODUCTS,
    URGENCIES,
    URGENCY_SIGNS,
    chat,
    general_example,
)

NEAR_DUPLICATES = 12


def ticket(rng: random.Random) -> tuple[str, str]:
    """A ticket in a customer's words, and the JSON that the support desk wants."""
    summary, category, wordings = rng.choice(ISSUES)
    product, urgency = rng.choice(PRODUCTS), rng.choice(URGENCIES)
    problem = rng.choice(wordings).format(p=product)
    sign = rng.choice(URGENCY_SIGNS[urgency])
    sentences = [f"{problem[0].upper()}{problem[1:]}.", f"{sign[0].upper()}{sign[1:]}."]
    if rng.random() < 0.3:
        sentences.reverse()
    text = f"{rng.choice(OPENINGS)}, {' '.join(sentences)} {rng.choice(CLOSINGS)}, {rng.choice(NAMES)}"
    answer = dict(zip(FIELDS, [category, urgency, product, summary], strict=True))
    return f"Ticket: {text}", json.dumps(answer)


def near_duplicate(prompt: str, answer: str) -> tuple[str, str]:
    """The same ticket sent again with one more mark: above 0.85 Jaccard similarity in 5-character shingles."""
    return f"{prompt}!", answer


def distinct(make, rng: random.Random, count: int, taken: set[str]) -> list[tuple[str, str]]:
    """``count`` examples whose prompts are not in ``taken``; adds them to it."""
    examples: list[tuple[str, str]] = []
    while len(examples) < count:
        prompt, answer = make(rng)
        if prompt not in taken:
            taken.add(prompt)
            examples.append((prompt, answer))
    return examples


def make(out: Path, rows: int, seed: int, general_rows: int = 200) -> None:
    rng, taken = random.Random(seed), set[str]()
    general_test = distinct(general_example, rng, general_rows, taken)
    general_train = distinct(general_example, rng, rows * 3 // 2, taken)  # with as many as tickets, it forgets 4 points
    tickets = distinct(ticket, rng, rows, taken)
    tickets += [near_duplicate(*example) for example in rng.sample(tickets, min(NEAR_DUPLICATES, rows // 10))]
    rng.shuffle(tickets)
    out.mkdir(parents=True, exist_ok=True)
    for name, examples in {"tickets": tickets, "general-train": general_train, "general-test": general_test}.items():
        lines = [json.dumps(chat(*example)) for example in examples]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--rows", type=int, default=1250, help="tickets (default 1250); half as many again general")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.rows, arguments.seed)
