"""One TensorRT engine, built in a child process: everything that touches the library, `tensorrt` 10 and 11 or `tensorrt_rtx`.

A builder can crash, hang or run out of memory, and takes nobody with it. The library is chosen by name and asked for its
features, never for its version number. A job and its answer are dictionaries, JSON through the child's pipes.

References, by class: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Builder.html,
.../Core/BuilderConfig.html, .../Core/OptimizationProfile.html, .../Core/ProgressMonitor.html, .../Core/Logger.html,
.../infer/Graph/Network.html, .../parsers/Onnx/pyOnnx.html; of RTX alone (targets, portable engines):
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arinar.files import replacing
from arinar.runtime.backends.engines import EngineError

# Lines of a child's output that are meant for us; the libraries print there too.
MARK = "arinar-build: "

Progress = Callable[[str], None]

# ---------------------------------------------------------------------------------------------------- parent

_BOOT = (
    "import json, sys; job = json.loads(sys.stdin.read()); sys.path[:] = job['sys_path']; "
    "from arinar.export.builder import child; child(job)"
)


def run_child(job: dict[str, Any], timeout: float, say: Progress | None = None) -> dict[str, Any]:
    """Run `child` in a process of its own -> its answer. Raises EngineError for a crash, a time-out or an error."""
    tail: list[str] = []
    answer: dict[str, Any] = {}

    def listen(stream: Any) -> None:
        for line in stream:
            if not line.startswith(MARK):
                tail.append(line.strip())
                del tail[:-5]
                continue
            message = json.loads(line[len(MARK) :])
            if "progress" not in message:
                answer.update(message)
            elif say:
                say(message["progress"])

    process = subprocess.Popen(
        [sys.executable, "-c", _BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    listener = threading.Thread(target=listen, args=(process.stdout,), daemon=True)
    listener.start()
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says so
            process.stdin.write(json.dumps(job | {"sys_path": sys.path}))
            process.stdin.close()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"it did not finish within {timeout:g} s and was ended; allow it more time, or a lower optimization level"
            ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        listener.join(10)
    said = f" Last words: {' | '.join(line for line in tail if line)}" if any(tail) else ""
    if code < 0:
        name = signal.Signals(-code).name
        why = "; the machine may be out of memory" if name == "SIGKILL" else ""
        raise EngineError(f"the builder of {job['module']} crashed with {name}{why}.{said}")
    if "error" in answer:
        raise EngineError(answer["error"])
    if code != 0 or not answer:
        raise EngineError(f"the builder of {job['module']} ended with exit code {code} and no result.{said}")
    return answer


# ----------------------------------------------------------------------------------------------------- child


def child(job: dict[str, Any]) -> None:
    """The child process: do the job, print the answer."""
    try:
        answer = _describe(job) if job["what"] == "probe" else _build_serialized(job)
    except Exception as error:  # whatever a library raises must reach the parent as a message
        answer = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, _BuildError) else str(error)}
    _tell(answer)


def _tell(message: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(message)}", flush=True)


class _BuildError(RuntimeError):
    """Of the library: parser or builder refused."""


def _describe(job: dict[str, Any]) -> dict[str, Any]:
    trt = importlib.import_module(job["module"])
    targets = []
    if hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability"):
        for name in trt.ComputeCapability.__members__:
            if match := re.fullmatch(r"SM(\d+)(\d)", name):
                targets.append(f"{match[1]}.{match[2]}")
    return {"version": trt.__version__, "targets": targets}


def _build_serialized(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure, build, write. Only calls that tensorrt 10, 11 and tensorrt_rtx have in common, or asked for."""
    trt = importlib.import_module(job["module"])
    notes: list[str] = []
    complaints: list[str] = []
    log = _log(trt, complaints)
    builder = trt.Builder(log)
    # The parser owns the weights that the network refers to: it must live as long.
    network, _parser = _parse(trt, builder, log, complaints, job["onnx"])
    config = _configure(trt, builder, complaints, job)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RTX has timing caches in name only
        cache = _load_timing_cache(config, job["timing_cache"], notes)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise _BuildError("the builder refused the graph: " + "; ".join(complaints[-4:] or ["no reason given"]))
        if cache is not None:
            _save_timing_cache(config, Path(job["timing_cache"]), notes)
    with open(job["out"], "wb") as file:
        file.write(serialized)
        file.flush()
        os.fsync(file.fileno())
    return {"notes": notes}


def _log(trt: Any, complaints: list[str]) -> Any:
    """A logger of the library that writes its errors into ``complaints``."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                complaints.append(message.strip())

    return Log()


def _parse(trt: Any, builder: Any, log: Any, complaints: list[str], onnx: str) -> tuple[Any, Any]:
    """A graph's file -> network and parser."""
    kinds = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 and RTX know no other networks than strongly typed ones; 10 must be told.
    network = builder.create_network(1 << int(kinds.STRONGLY_TYPED) if hasattr(kinds, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(onnx):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _BuildError("the parser refused the graph: " + "; ".join(errors or complaints or ["no reason given"]))
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        # A shape tensor is read on the host: its value could not change within a recorded CUDA graph.
        if tensor.is_shape_tensor:
            raise _BuildError(f"input {tensor.name!r} became a shape tensor; inputs must be data")
    return network, parser


def _configure(trt: Any, builder: Any, complaints: list[str], job: dict[str, Any]) -> Any:
    """The builder's configuration: flags, targets, the profiles of shapes, a monitor."""
    flags: dict[str, Any] = job["flags"]
    config = builder.create_builder_config()
    if flags["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags["workspace"])
    if flags["optimization_level"] is not None:
        config.builder_optimization_level = flags["optimization_level"]
    if not flags["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; rounds the factors of float32 products to 10 bits
    if flags["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job["targets"] and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(job["targets"])
        for index, target in enumerate(job["targets"]):
            if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{target.replace('.', '')}"], index):
                raise _BuildError(f"compute capability {target} was refused: {'; '.join(complaints)}")
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise _BuildError(f"the shapes {shapes} were refused: {'; '.join(complaints)}")
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt)
    return config


def _monitor(trt: Any) -> Any:
    """Prints the outermost phases of a build, and how far they are, every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.last = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now, total = time.monotonic(), self.steps.get(phase_name)
            if total and now - self.last > 5:
                self.last = now
                _tell({"progress": f"{phase_name}: {step + 1} of {total}"})
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _load_timing_cache(config: Any, path: str | None, notes: list[str]) -> Any:
    if path is None:
        return None
    if not hasattr(config, "create_timing_cache"):
        notes.append("this library keeps no timing cache; --timing-cache has no effect")
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        notes.append(f"the timing cache {file} does not fit this library and GPU; starting a new one")
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            return None
    return cache


def _save_timing_cache(config: Any, path: Path, notes: list[str]) -> None:
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    if data is None or not len(memoryview(data)):
        notes.append("this library wrote no timing cache")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(memoryview(data))
