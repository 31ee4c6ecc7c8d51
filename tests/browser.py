"""A page as a real browser sees it: its document after its scripts ran, and what they complained of."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@dataclass(frozen=True)
class Seen:
    """What stands on the page."""

    document: str
    complaints: list[str]
    """Errors on the console, and requests to anywhere."""

    @property
    def charts(self) -> int:
        """Places for a chart in which one was drawn."""
        return len(re.findall(r'class="plot-container plotly"', self.document))


def look_at(page: Path | str, profile: Path, width: int = 1200) -> Seen:
    assert CHROMIUM
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    options += [f"--window-size={width},2000", "--virtual-time-budget=10000", "--dump-dom"]
    address = page if isinstance(page, str) else page.as_uri()
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=180)
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    outside = re.findall(r'src="(?:https?:)?//[^"]+"', done.stdout)
    return Seen(done.stdout, complaints + outside)
