"""What the checks found, as it comes in: the file is written after each, so that a run that dies leaves what it had."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

#: How bad a finding is, worst first: it does not run at all; it runs and is wrong; right, and slower than it has to be.
SEVERITIES = ("broken", "wrong", "slow")


class Report:
    """``budget`` seconds from now; ``clock`` tells them, and times what is timed on the host."""

    def __init__(self, path: Path | None, budget: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path, self.budget, self.clock = path, budget, clock
        self.began = clock()
        self.data: dict[str, Any] = {"budget_s": budget, "findings": [], "skipped": [], "checks": []}

    def elapsed(self) -> float:
        return self.clock() - self.began

    def left(self) -> float:
        return self.budget - self.elapsed()

    def say(self, line: str) -> None:
        click.echo(f"[{self.elapsed():6.1f} s] {line}")
        sys.stdout.flush()

    def save(self) -> None:
        self.data["seconds"] = round(self.elapsed(), 1)
        self.data["findings"].sort(key=lambda finding: SEVERITIES.index(finding["severity"]))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")

    def find(self, severity: str, check: str, evidence: str, remedy: str, detail: str = "") -> None:
        """Something to mend: which check showed it, what it saw, what to do; ``detail`` a traceback, say."""
        finding = {"severity": severity, "check": check, "evidence": evidence[:2000], "remedy": remedy}
        self.data["findings"].append(finding | ({"detail": detail[-6000:]} if detail else {}))
        self.say(f"{severity.upper()} {check}: {evidence.splitlines()[0][:300] if evidence else ''}")

    def skip(self, what: str, why: str) -> None:
        self.data["skipped"].append({"what": what, "why": why})
        self.say(f"skipped {what}: {why}")

    def add(self, key: str, value: Any) -> None:
        """A result to the list ``key``."""
        self.data.setdefault(key, []).append(value)

    @contextlib.contextmanager
    def check(self, name: str, remedy: str = "read the traceback in detail") -> Iterator[None]:
        """A check: a failure in here becomes a finding, and ends here."""
        began, before = self.clock(), len(self.data["findings"])
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a library may even end the interpreter
            lines = str(error).strip().splitlines() or [""]
            self.find("broken", name, f"{type(error).__name__}: {lines[0]}", remedy, traceback.format_exc())
        finally:
            found = len(self.data["findings"]) - before
            self.add("checks", {"check": name, "findings": found, "seconds": round(self.clock() - began, 2)})
            if not found:
                self.say(f"passed {name}")
            self.save()
