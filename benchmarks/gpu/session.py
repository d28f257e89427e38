"""What the checks share: settings, bundles, opened pipelines, engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arinar.config import ArinarConfig
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends.tensorrt import installed

from .models import ROOT, Exports
from .report import Report

BACKENDS = ("onnxruntime-cuda", "tensorrt")
#: Libraries that build engines: import name -> backend of `arinar build`.
BUILDERS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass
class Session:
    """``demo``, ``full``, ``causal``: names of the small trained model, the full-size one, the causal one. ``most``: images
    that an engine takes at a time."""

    report: Report
    exports: Exports
    precision: str
    demo: str
    full: str
    causal: str
    sizes: Sequence[int]
    num_iter: int
    guidance_scale: float
    no_demo: bool = False
    most: int = 64
    names: dict[str, list[str]] = field(default_factory=dict)
    pipelines: dict[tuple[str, str], Pipeline] = field(default_factory=dict)

    def steps(self, config: ArinarConfig) -> int:
        """Outer steps of a generation that is timed."""
        return config.seq_len if config.outer == "causal" else min(self.num_iter, config.seq_len)

    def path(self, name: str) -> Path:
        return self.exports.bundle(name, self.precision)

    def bundle(self, name: str) -> Bundle:
        return Bundle.open(self.path(name))

    def open(self, name: str, backend: str, **options: Any) -> Pipeline:
        """A pipeline; without options always the same one."""
        if options:
            return Pipeline.load(self.path(name), backend=backend, precision=self.precision, verify=False, **options)
        key = name, backend
        if key not in self.pipelines:
            self.pipelines[key] = Pipeline.load(self.path(name), backend=backend, precision=self.precision, verify=False)
        return self.pipelines[key]

    def possible(self, name: str) -> list[str]:
        """GPU backends that open a bundle, their engines built; why the others do not is written down, and a finding where
        none does."""
        if name in self.names:
            return self.names[name]
        self.build(name)
        names, verdicts = self.names.setdefault(name, []), {}
        for backend in BACKENDS:
            try:
                self.open(name, backend).loop.prepare(guided=True)
                names.append(backend)
                verdicts[backend] = "possible"
            except Exception as error:
                verdicts[backend] = f"{type(error).__name__}: {error}"
        self.report.data.setdefault("backends", {})[name] = verdicts
        for backend, verdict in verdicts.items():
            self.report.say(f"{backend} on {name}: {verdict.splitlines()[0][:300]}")
        if not names:
            evidence = "; ".join(f"{backend}: {verdict}" for backend, verdict in verdicts.items())
            self.report.find("broken", f"backends on {name}", evidence, "each message names what is missing")
        return names

    def build(self, name: str) -> None:
        """Engines for this GPU, where a TensorRT library is installed and the bundle has none yet."""
        module = next((module for module in BUILDERS if installed(module)), None)
        path = self.path(name)
        if module is None:
            return
        # (Larger batches: attention's scores would have more elements at the profile's end than an axis may count.)
        command = [sys.executable, "-m", "arinar", "build", str(path), "--backend", BUILDERS[module]]
        command += ["--precision", self.precision, "--batch", f"1:{min(8, self.most)}:{self.most}"]
        with self.report.check(f"engines of {name}", "the builder's output is in engines"):
            timeout = max(30.0, self.report.left() / 3)
            began = self.report.clock()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
            output = (done.stdout + done.stderr)[-6000:]
            seconds = round(self.report.clock() - began, 1)
            self.report.add("engines", {"bundle": name, "library": module, "code": done.returncode, "seconds": seconds})
            if done.returncode:
                raise RuntimeError(f"arinar build ended with code {done.returncode}: {output}")

    def close(self, name: str) -> None:
        """Give a model's memory back."""
        self.pipelines = {key: pipeline for key, pipeline in self.pipelines.items() if key[0] != name}
