"""This machine: its processor, the cores that this process may use, the packages that are installed."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import BundleError

# Packages that results depend on where they were imported.
IMPORTED = ("onnxruntime", "openvino", "tensorrt", "torch")


def machine(packages: Sequence[str] | None = None) -> dict[str, Any]:
    """What a result depends on, ready for JSON: ``cpu`` its name, ``cores`` that this process may use, ``cpus`` that the
    machine has, ``architecture``, ``system``, ``platform``, ``versions``, ``date``.

    packages : whose versions are told, where installed. Default: NumPy and what of ``IMPORTED`` this process has.
    """
    versions = {"python": platform.python_version()}
    if packages is None:
        versions["numpy"] = np.__version__
        versions |= {name: str(getattr(sys.modules[name], "__version__", "?")) for name in IMPORTED if name in sys.modules}
    for name in packages or ():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "platform": platform.platform(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor_name() -> str:
    """The processor's model name, or at least its kind."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, one of the threads that share a core, the quota of its
    control group (containers)."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            return max(1, min(len(cores), round(int(allowed) / int(period))))
    return len(cores)


def onnxruntime_distribution() -> str | None:
    """Which ONNX Runtime package is installed: "onnxruntime", "onnxruntime-gpu" or None.

    Raises BundleError where both are, in one folder: they overwrite each other's files, and which one answers is
    chance. In different folders, the one that comes first on the path answers.
    """
    found: dict[str, str] = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = os.path.realpath(str(metadata.distribution(name).locate_file("")))
    if len(found) > 1:
        if len(set(found.values())) == 1:
            raise BundleError(
                "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files. Uninstall both, "
                "then install one: `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install onnxruntime` or "
                "`pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31' 'nvidia-cublas<14'`"
            )
        path = [os.path.realpath(folder or ".") for folder in sys.path]
        return min(found, key=lambda name: path.index(found[name]) if found[name] in path else len(path))
    return next(iter(found), None)
