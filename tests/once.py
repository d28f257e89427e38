"""Something made once per test run, by whichever worker process comes first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def once(done: Path, make: Callable[[], object]) -> None:
    """Call ``make``, which must leave ``done`` behind, unless it is there; other processes wait meanwhile."""
    lock = done.with_name(f"{done.name}.lock")
    while not done.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.5)  # another worker is making it
            continue
        try:
            if not done.exists():
                make()
        finally:
            lock.unlink()
