"""Imports without what a library takes along wherever it is installed: seconds and memory for nothing that is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """To what is imported in the block, these libraries are not installed; later imports find them as before.

    What is imported first in the block goes by that for good. Nothing else may be importing at the same time.
    """
    loaded = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: the import system's word for that
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(loaded)
