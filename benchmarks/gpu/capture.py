"""Whether ONNX Runtime's launches can be captured in CUDA graphs, and replays are bit for bit what plain launches are.

python -m benchmarks.gpu.capture BUNDLE PRECISION        # a process of its own: a capture may end it
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from arinar.runtime import Pipeline

from .models import ROOT
from .session import Session

#: Generations of one shape: enough to warm up, to capture, and to replay several times.
SEEDS = range(6)


def check(session: Session, name: str, timeout: float) -> None:
    """In a child process; findings where its runs differ, and where they cannot be captured."""
    report = session.report
    if "onnxruntime-cuda" not in session.possible(name):
        report.skip(f"capture of {name}", "ONNX Runtime CUDA is not possible")
        return
    with report.check(f"capture: {name}", "a process that ends here died in a capture: leave CUDA graphs off"):
        command = [sys.executable, "-m", "benchmarks.gpu.capture", str(session.path(name)), session.precision]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        result = json.loads(lines[-1]) if lines else None
        report.add("capture", {"model": name, "code": done.returncode, "result": result, "stderr": done.stderr[-2000:]})
        if done.returncode or result is None:
            raise RuntimeError(f"it ended with code {done.returncode}: {done.stderr[-1500:]}")
        judge(session, name, result)


def judge(session: Session, name: str, result: dict[str, Any]) -> None:
    find, where = session.report.find, f"capture: {name}"
    if not result["repeatable"]:
        find("wrong", where, "the same call twice gives other tokens", "a kernel whose order of sums changes: which graph?")
    if not result["same_when_waiting"]:
        find("wrong", where, "other tokens when every run is waited for", "something is not in the order of the stream")
    if result["captured"]["warnings"]:
        find("slow", where, "; ".join(result["captured"]["warnings"]), "the message names what a capture does not allow")
    if max(result["captured"]["largest_error"]) > 0:
        find("wrong", where, f"replays differ by {result['captured']['largest_error']}", "leave CUDA graphs off")


def experiment(bundle: Path, precision: str) -> dict[str, Any]:
    """Tokens of several seeds, plainly, with waits, and captured. Prints what it has before it captures."""

    def open_(**options: Any) -> Pipeline:
        return Pipeline.load(bundle, backend="onnxruntime-cuda", precision=precision, verify=False, **options)

    def tokens(pipeline: Pipeline, seed: int) -> Any:
        return pipeline.generate([1, 0], seed=seed, num_iter=min(8, pipeline.config.seq_len)).tokens

    plain, result = open_(cuda_graphs=False), dict[str, Any]()
    want = [tokens(plain, seed) for seed in SEEDS]
    result["repeatable"] = bool(np.array_equal(want[0], tokens(plain, 0)))
    result["same_when_waiting"] = bool(np.array_equal(want[0], tokens(open_(wait=True, cuda_graphs=False), 0)))
    print(
        json.dumps(result | {"captured": {"largest_error": [0.0], "warnings": ["the process ended in a capture"]}}), flush=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = open_(cuda_graphs=True)
        have = [tokens(captured, seed) for seed in SEEDS]
    result["captured"] = {
        "largest_error": [float(np.abs(a - b).max()) for a, b in zip(have, want, strict=True)],
        "warnings": [str(item.message) for item in caught],
    }
    return result


if __name__ == "__main__":
    print(json.dumps(experiment(Path(sys.argv[1]), sys.argv[2])))
