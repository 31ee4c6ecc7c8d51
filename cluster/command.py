"""The edge of every command: exit statuses, a line for people, and the one place where errors end."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

DONE, FAILED, WRONG_INPUT, REJECTED, INTERRUPTED = 0, 1, 2, 3, 130
_THRESHOLDS = 50_000, 50, 10
"""Imports make a million objects that stay. By Python's own thresholds a quarter of their time goes into looking for
garbage among them."""


def say(line: str) -> None:
    """One line for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


def guarded(command: Callable[[], int], interrupted: str) -> int:
    """The command's own exit status; a user's mistake is one line and 2, any other failure 1 with its trace.

    Args:
        interrupted: what to tell a user who pressed Ctrl-C. SIGTERM, as ``ray job stop`` sends it, is the same.
    """
    gc.set_threshold(*_THRESHOLDS)
    atexit.register(gc.freeze)  # or an interpreter that ends looks through them all, again and again, for two seconds
    try:
        with _sigterm_interrupts():
            return command()
    except ValueError as error:
        say(f"error: {error}")
        return WRONG_INPUT
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED
    except Exception as error:  # the process boundary: everything left is Winnow's or the cluster's
        traceback.print_exc()
        say(f"error: {error}")
        return FAILED


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(_: int, frame: FrameType | None) -> None:
        taken = signal.getsignal(signal.SIGINT)  # Tune, while it runs, ends its trials in order
        if not callable(taken):  # what a shell starts in the background ignores Ctrl-C
            raise KeyboardInterrupt
        taken(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
