"""A set of tickets with something wrong planted for every check there is, and what has to be found of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PERSONAL = {
    "EMAIL_ADDRESS": "ada.lovelace@example.com",
    "PHONE_NUMBER": "+44 20 7946 0958",
    "CREDIT_CARD": "4111 1111 1111 1111",
    "IBAN_CODE": "DE89 3704 0044 0532 0130 00",
    "IP_ADDRESS": "203.0.113.77",
    "NATIONAL_ID": "536-90-4399",
    "API_KEY": "ghp_" + "a1B2c3D4e5F6g7H8i9" * 2,
}
"""By kind, a value that stands in one ticket each. None is anybody's."""

PLANTED = {
    "broken_row": ("error", 2),
    "missing_field": ("error", 1),
    "empty_text": ("error", 1),
    "wrong_value": ("error", 1),
    "share": ("error", None),
    "contradiction": ("warning", 1),
    "truncated_answer": ("warning", 2),
    "label_casing": ("warning", 3),
    "class_balance": ("warning", None),
    "language_mix": ("warning", 2),
    "no_trained_token": ("error", 1),
    "over_long": ("warning", 2),
    "personal_data": ("warning", 8),
    "held_out_twin": ("warning", 1),
    "duplicate": ("info", None),
    "few": ("warning", None),
}
"""By check: the level of its finding, and the count where nothing else in the world adds to it."""


def ticket(text: str, **answer: str) -> dict[str, Any]:
    fields = {"category": "billing", "urgency": "low", "product": "Lumen Lamp", "summary": "charged twice"} | answer
    return chat(f"Ticket: {text}", json.dumps(fields))


def chat(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def plant(tickets: Path, general: Path, folder: Path) -> None:
    """``tickets.jsonl``, the good rows of ``tickets`` with plants, and ``synthetic.jsonl``, in ``folder``."""
    good = [json.loads(line) for line in tickets.read_text().splitlines()]
    held_out = json.loads(general.read_text().splitlines()[0])
    german = "Guten Tag, leider ist die bestellte Lampe gestern schon wieder zerbrochen bei mir angekommen, Nummer {}."
    rows: list[Any] = [
        *good,
        good[1],
        held_out,
        ticket("no", category="account")
        | {"messages": [good[0]["messages"][0], ticket("no", category="legal")["messages"][1]]},
        chat("Ticket: my lamp broke", '{"category": "billing", "urgency": "lo'),
        chat("Ticket: my drone fell", '{"category": "shipping", "urgency":'),
        *(ticket(f"please look at order {word}", category="Billing") for word in ("alpha", "beta", "gamma")),
        *(ticket(german.format(number)) for number in ("sieben", "zwölf")),
        ticket("and again " * 80 + "the end"),
        ticket("my lamp", summary="it is broken " * 40),
        *(ticket(f"I am {entity.lower().replace('_', ' ')} {value}") for entity, value in PERSONAL.items()),
        ticket(
            f"write to {PERSONAL['EMAIL_ADDRESS']} or {PERSONAL['EMAIL_ADDRESS'].upper()}, never to bob@example.org"
        ),
    ]
    wrong = ['{"messages": [', "[1, 2]", '{"text": "no messages"}']
    wrong += [json.dumps(chat("Ticket: empty", "  ")), json.dumps({"messages": "none"})]
    folder.mkdir()
    (folder / "tickets.jsonl").write_text("\n".join([*map(json.dumps, rows), *wrong]))
    made = [{"prompt": f"Name thing number {number}.", "completion": f"Thing {number * 7919}."} for number in range(60)]
    (folder / "synthetic.jsonl").write_text("\n".join(map(json.dumps, made)))
