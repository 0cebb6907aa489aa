"""Which of the system's Chromiums the tests drive."""

from __future__ import annotations

import shutil

# Debian builds both from the same source. The shell has no windows: a fresh profile and a loaded page take 0.4 to
# 0.6 s in it and 0.9 to 1.0 s in the whole browser (two times 14 on two cores), the suite 218 s and 367 s (once each).
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser")
MISSING = "chromium is not installed: apt-get install chromium-headless-shell"


def find() -> str | None:
    """Path of the first that is installed."""
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)
