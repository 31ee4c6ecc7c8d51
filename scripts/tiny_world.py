"""The words and the general tasks of the tiny world: what the base learns and what a sweep must not make it forget.

Both makers (``make_tiny_base.py``, ``make_ticket_data.py``) draw from here; nothing in the packages does.
Every word of tickets and their answers stands in ``WORDS``, so the base has produced every token of it before
fine-tuning starts: with tied embeddings a token never produced keeps a short vector that LoRA cannot lengthen.
"""

from __future__ import annotations

import random
from collections.abc import Callable

PRODUCTS = ["Aurora Router", "Nimbus Drive", "Pixel Printer", "Echo Speaker", "Orbit Watch", "Delta Tablet",
            "Solar Charger", "Falcon Drone", "Metro Scooter", "Lumen Lamp"]  # fmt: skip

CATEGORIES = ["billing", "technical", "account", "shipping"]
URGENCIES = ["low", "medium", "high"]
FIELDS = ["category", "urgency", "product", "summary"]

ISSUES = [
    # canonical summary, category, ways in which customers say it
    ("charged twice", "billing", ["I was charged twice for the {p}", "my card shows two payments for one {p}",
        "you billed me double for the {p}", "there is a duplicate payment for my {p}"]),
    ("invoice is missing", "billing", ["I never got an invoice for the {p}", "where is the invoice for my {p}",
        "the invoice for the {p} did not arrive", "please send me the missing bill for the {p}"]),
    ("does not turn on", "technical", ["my {p} does not turn on", "the {p} stays dark when I press the button",
        "the {p} is dead since this morning", "nothing happens when I start the {p}"]),
    ("loses connection", "technical", ["the {p} keeps losing the connection", "my {p} drops off the network all day",
        "the {p} goes offline every hour", "the signal of the {p} breaks again and again"]),
    ("cannot log in", "account", ["I cannot log in to the app of my {p}", "the {p} app rejects my password",
        "my login for the {p} stopped working", "I am locked out of my {p} profile"]),
    ("wants account deleted", "account", ["please delete my {p} account", "close my account, I sold the {p}",
        "remove all the data of my {p} account", "I want my {p} account gone for good"]),
    ("parcel is late", "shipping", ["the parcel with my {p} is late", "my {p} should have been here last week",
        "I am still waiting for the {p}", "tracking for the {p} has not moved for days"]),
    ("arrived broken", "shipping", ["the {p} arrived broken", "the box was crushed and the {p} is cracked",
        "my new {p} came in pieces", "the glass of the {p} was smashed in the parcel"]),
]  # fmt: skip

URGENCY_SIGNS = {
    "low": ["no hurry", "whenever you have time", "this can wait", "take your time"],
    "medium": ["please answer this week", "I hope to hear from you soon", "a reply in the next days would help",
               "please get back to me"],
    "high": ["I need help right now", "this is urgent", "fix it today", "it is an emergency"],
}  # fmt: skip

OPENINGS = ["Hello", "Hi", "Hi team", "Dear support", "Good morning", "Hey", "To whom it may concern", "Greetings"]
CLOSINGS = ["Thanks", "Thank you", "Best wishes", "Regards", "Cheers", "Many thanks", "Yours", "Bye"]
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ivy", "Jon", "Kim", "Leo", "Mia", "Noah", "Olga",
         "Paul"]  # fmt: skip

COMMON = [
    "apple",
    "bread",
    "chair",
    "dance",
    "eagle",
    "fruit",
    "green",
    "house",
    "ice",
    "juice",
    "knife",
    "lemon",
    "mouse",
    "night",
    "ocean",
    "paper",
    "queen",
    "river",
    "stone",
    "table",
    "under",
    "voice",
    "water",
    "yellow",
    "zebra",
    "book",
    "cloud",
    "door",
    "fire",
    "gold",
    "hand",
    "island",
    "jacket",
    "king",
    "light",
    "moon",
    "north",
    "orange",
    "plant",
    "quiet",
    "road",
    "silver",
    "train",
    "uncle",
    "valley",
    "window",
    "young",
    "bird",
    "cake",
    "desk",
    "earth",
    "farm",
    "game",
    "hat",
    "iron",
    "job",
    "key",
    "lake",
    "map",
    "nest",
    "old",
    "pen",
    "rain",
    "sand",
    "tree",
    "use",
    "van",
    "wood",
    "year",
    "box",
    "fox",
    "quick",
    "lazy",
    "jump",
    "over",
    "six",
    "blue",
    "red",
    "seven",
    "eight",
    "nine",
    "ten",
]

KINDS = {
    "animal": ["dog", "cat", "horse", "zebra", "mouse", "eagle", "fox", "bird"],
    "color": ["red", "green", "blue", "yellow", "silver", "gold"],
    "food": ["bread", "cake", "lemon", "apple", "cheese", "juice"],
    "number": ["six", "seven", "eight", "nine", "ten", "three"],
    "place": ["house", "island", "valley", "farm", "river", "ocean"],
}


def _domain_words() -> list[str]:
    """Every word of tickets and answers: the base knows them all, but not what a desk does with them."""
    signs = [sign for signs in URGENCY_SIGNS.values() for sign in signs]
    wordings = [wording.replace("{p}", "") for _, _, ways in ISSUES for wording in ways]
    summaries = [summary for summary, _, _ in ISSUES]
    phrases = [*PRODUCTS, *CATEGORIES, *URGENCIES, *FIELDS, *summaries, *signs, *wordings]
    return [word for phrase in phrases for word in phrase.replace(",", "").split()]


WORDS = list(dict.fromkeys([*COMMON, *_domain_words(), *(word for kind in KINDS.values() for word in kind)]))


FILLERS = [word for word in WORDS if not any(word in kind for kind in KINDS.values())]


def _some(rng: random.Random, low: int, high: int) -> list[str]:
    """Distinct words, so that each one has one successor."""
    return rng.sample(WORDS, rng.randint(low, high))


def _hide(rng: random.Random, *words: str) -> str:
    """``words`` at random places among others that are of no kind."""
    text = rng.sample(FILLERS, rng.randint(3, 10))
    for word in words:
        text.insert(rng.randrange(len(text) + 1), word)
    return " ".join(text)


def _repeat(rng: random.Random) -> tuple[str, str]:
    words = " ".join(_some(rng, 1, 6))
    return f"Repeat: {words}", words


def _first(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 2, 5)
    return f"First word: {' '.join(words)}", words[0]


def _last(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 2, 5)
    return f"Last word: {' '.join(words)}", words[-1]


def _count(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 1, 6)
    return f"Count the words: {' '.join(words)}", str(len(words))


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(COMMON)
    return f"Spell: {word}", " ".join(word)


def _wrap(rng: random.Random) -> tuple[str, str]:
    key, *value = _some(rng, 2, 5)
    return f"Wrap: {key} = {' '.join(value)}", f'{{"{key}": "{" ".join(value)}"}}'


def _kind(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(list(KINDS))
    return f"Which kind: {_hide(rng, rng.choice(KINDS[kind]))}", kind


def _find(rng: random.Random) -> tuple[str, str]:
    wanted, other = rng.sample(list(KINDS), 2)
    word = rng.choice(KINDS[wanted])
    return f"Find the {wanted}: {_hide(rng, word, rng.choice(KINDS[other]))}", word


def _extract(rng: random.Random) -> tuple[str, str]:
    kinds = rng.sample(list(KINDS), 2)
    words = [rng.choice(KINDS[kind]) for kind in kinds]
    fields = ", ".join(f'"{kind}": "{word}"' for kind, word in zip(kinds, words, strict=True))
    return f"Extract {kinds[0]} and {kinds[1]}: {_hide(rng, *words)}", f"{{{fields}}}"


TASKS: list[Callable[[random.Random], tuple[str, str]]] = [
    _repeat, _repeat, _wrap, _wrap, _first, _last, _count, _spell, _kind, _kind, _find, _find, _extract, _extract,
]  # fmt: skip


def general_example(rng: random.Random) -> tuple[str, str]:
    """One general instruction and its answer, drawn evenly over ``TASKS``."""
    return rng.choice(TASKS)(rng)


def chat(prompt: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """A row of chat JSONL: one user message and one assistant message."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
