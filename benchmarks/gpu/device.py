"""This machine, and the little of CUDA that everything rests on: each call by itself, in the order in which they build on
one another."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import threading
from typing import Any

import numpy as np

from arinar.runtime.backends.cuda import Cuda, device_info, load_runtime
from arinar.runtime.machine import machine

from .report import Report

PACKAGES = (
    "arinar",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-lean",
    "tensorrt-rtx",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "numpy",
)
CLOCKS = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw,memory.used,driver_version"


def describe(report: Report) -> None:
    """Versions, driver, GPU, free memory, clocks. Raises NoGpuError where there is no GPU."""
    found = report.data["machine"] = machine(PACKAGES)
    info = device_info(load_runtime())
    found["gpu"] = {
        "name": info.name,
        "compute_capability": info.compute_capability,
        "memory_gib": round(info.memory / 2**30, 1),
        "cuda_of_driver": info.driver,
    }
    report.say(f"{info.name}, compute capability {info.compute_capability}, driver of CUDA {info.driver}")
    for name in ("torch", "onnxruntime"):  # PyTorch first: it loads the CUDA libraries that both use
        with report.check(f"import {name}", f"`pip install '.[{'export' if name == 'torch' else 'gpu'}]'`"):
            module = importlib.import_module(name)
            found[name] = {"version": module.__version__}
            if name == "torch":
                found[name]["cuda"] = module.version.cuda if module.cuda.is_available() else None
            else:
                found[name]["providers"] = module.get_available_providers()
    report.data["clocks_before"] = clocks()


def clocks() -> str | None:
    """What nvidia-smi says of clocks, throttling, temperature, power; None where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def check_cuda(report: Report) -> None:
    """A line each: memory, copies, capture, events, threads."""
    remedy = "compare the call in runtime/backends/cuda.py with the runtime's reference"
    with report.check("cuda: open the device", "see the message: driver, cuda-bindings, CUDA_VISIBLE_DEVICES"):
        cuda = Cuda()
        free, total = cuda.memory()
        report.data["machine"]["free_gib"] = round(free / 2**30, 2)
        if free < total / 2:
            report.find(
                "slow", "cuda: free memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free", "end other processes"
            )
        for name, test in SELF_TESTS.items():
            with report.check(f"cuda: {name}", remedy):
                test(cuda)


def _copies(cuda: Cuda) -> None:
    values = np.arange(1000, dtype=np.float32)
    buffer, other = cuda.empty((1000,), "float32"), cuda.empty((1000,), "float32")
    cuda.upload(values, buffer)
    cuda.copy(buffer.pointer, other.pointer, buffer.nbytes)
    expect(cuda.download(other), values)
    cuda.clear(other)
    expect(cuda.download(other), np.zeros_like(values))


def _rows(cuda: Cuda) -> None:
    rows, target = np.arange(6, dtype=np.float32).reshape(3, 2), cuda.empty((3, 5), "float32")
    source = cuda.empty((3, 2), "float32")
    cuda.clear(target)
    cuda.upload(rows, source)
    cuda.copy_rows(source.pointer, target.pointer + 4, 8, 3, 20)
    expect(cuda.download(target)[:, 1:3], rows)


def _capture(cuda: Cuda) -> None:
    """Copies, a two-dimensional one among them, recorded and replayed twice, on other data the second time."""
    first, second, wide = (cuda.empty(shape, "float32") for shape in ((4, 2), (4, 2), (4, 3)))
    cuda.begin_capture()
    try:
        cuda.copy(first.pointer, second.pointer, first.nbytes)
        cuda.clear(wide)
        cuda.copy_rows(second.pointer, wide.pointer, 8, 4, 12)
        graph = cuda.end_capture()
    except BaseException:
        cuda.abandon_capture()
        raise
    for round_ in range(2):
        values = np.random.default_rng(round_).random((4, 2), np.float32)
        cuda.upload(values, first)
        cuda.launch_graph(graph)
        expect(cuda.download(wide), np.pad(values, ((0, 0), (0, 1))))
    cuda.destroy_graph(graph)


def _events(cuda: Cuda) -> None:
    buffer = cuda.empty((1 << 20,), "uint8")
    cuda.clear(buffer)
    cuda.wait_event(cuda.record_event())
    events = Stopwatch(cuda)
    events.mark()
    cuda.clear(buffer)
    events.mark()
    (between,) = events.milliseconds()
    if not 0 <= between < 1000:
        raise AssertionError(f"clearing 1 MiB took {between} ms by the events")


def _threads(cuda: Cuda) -> None:
    """Another thread has to activate the device before its first call, and then may use it."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            cuda.activate()
            _copies(cuda)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


SELF_TESTS = {
    "copies between host and device": _copies,
    "strided copies": _rows,
    "capture and replay": _capture,
    "events": _events,
    "another thread": _threads,
}


def expect(have: Any, want: Any) -> None:
    """Raise AssertionError where two arrays differ."""
    if not np.array_equal(have, want):
        raise AssertionError(f"got {np.asarray(have).ravel()[:8]}, expected {np.asarray(want).ravel()[:8]}")


class Stopwatch:
    """Times on the device, between marks on the stream."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.events: list[Any] = []

    def mark(self) -> None:
        event = self.cuda.call("cudaEventCreateWithFlags", 0)
        self.events.append(event)
        self.cuda.call("cudaEventRecord", event, self.cuda.stream)

    def milliseconds(self) -> list[float]:
        """Between each mark and the next; waits for the last."""
        cuda, events, self.events = self.cuda, self.events, []
        cuda.call("cudaEventSynchronize", events[-1])
        pairs = itertools.pairwise(events)
        found = [float(cuda.call("cudaEventElapsedTime", first, second)) for first, second in pairs]
        for event in events:
            cuda.runtime.cudaEventDestroy(event)
        return found
