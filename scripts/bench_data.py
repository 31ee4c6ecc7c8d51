"""What near-duplicate search costs as data grows: ``python scripts/bench_data.py --json [--rows 10000 100000]``.

Texts of about 60 words drawn from the tiny world, one in ten an earlier one with a word or two changed, one in twenty
an earlier one as it was. Every size runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tiny_world import WORDS  # noqa: E402

WORDS_A_TEXT, NEAR, EXACT = 60, 0.10, 0.05


def main() -> int:
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    sizes = [_apart(rows) for rows in arguments.rows]
    first, last = sizes[0], sizes[-1]
    growth = (last["seconds"] / first["seconds"]) / (last["rows"] / first["rows"])
    result = {"device": f"cpu ({len(os.sched_getaffinity(0))} cores)", "sizes": sizes, "growth": round(growth, 3)}
    for size in sizes:
        print("  ".join(f"{name} {value}" for name, value in size.items()), file=sys.stderr)
    print(f"seconds a row grow by {growth:.2f} from {first['rows']:,} to {last['rows']:,} rows", file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    return 0


def measure(rows: int) -> dict[str, Any]:
    """Seconds, duplicates found and planted, and bytes of memory beyond the texts themselves."""
    from trainables.data.duplicates import find_duplicates

    made, planted = texts(rows, random.Random(rows))
    list(find_duplicates(made[:100], 0.85))  # imports and first calls
    before, started = _peak(), time.monotonic()
    found = sum(1 for _ in find_duplicates(made, 0.85))
    seconds = time.monotonic() - started
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_a_second": round(rows / seconds),
        "planted": planted,
        "found": found,
        "bytes_a_row": round((_peak() - before) / rows),
    }


def texts(count: int, rng: random.Random) -> tuple[list[str], int]:
    """``count`` texts, and how many of them are planted repeats."""
    made: list[str] = []
    planted = 0
    for _ in range(count):
        kind = rng.random()
        if made and kind < NEAR + EXACT:
            planted += 1
            made.append(_changed(rng.choice(made), rng) if kind < NEAR else rng.choice(made))
        else:
            made.append(" ".join(rng.choices(WORDS, k=WORDS_A_TEXT)))
    return made, planted


def _changed(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(rng.randint(1, 2)):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def _peak() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _apart(rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Near-duplicate search as data grows.")
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
