"""Ask the served tickets model with the official OpenAI client: ``python scripts/ask_tickets.py --url URL``."""

from __future__ import annotations

import argparse
import json
import random
import sys

from openai import OpenAI

from make_ticket_data import ticket


def ask(url: str, count: int, seed: int) -> int:
    """Print ``count`` new tickets with their answers; returns how many answers were no JSON."""
    client, rng, broken = OpenAI(base_url=url, api_key="unused"), random.Random(seed), 0
    for _ in range(count):
        prompt, expected = ticket(rng)
        reply = client.chat.completions.create(
            model="tickets", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=96
        )
        answer = reply.choices[0].message.content or ""
        try:
            mark = "as expected" if json.loads(answer) == json.loads(expected) else "differs"
        except json.JSONDecodeError:
            mark, broken = "no JSON", broken + 1
        print(f"{prompt}\n  {answer}  [{mark}]")
    return broken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=12345)
    arguments = parser.parse_args()
    sys.exit(1 if ask(arguments.url, arguments.count, arguments.seed) else 0)
