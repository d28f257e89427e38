"""Graphs of a bundle -> TensorRT engines, with `tensorrt` 10 and 11 and `tensorrt_rtx` alike.

Engines go to ``engines/<key>/<graph>.engine`` inside the bundle, each with a sidecar beside it; layout, sidecar and the
rules by which the runtime chooses are in `arinar.runtime.backends.engines`. The manifest is not touched.

What to build is planned here, and kept where nothing has changed; each engine is built in a child process, by `builder`.

Networks are strongly typed: an engine computes in the dtypes that its graph was exported with. Shapes are free within
profiles, which follow from the graph's symbolic axes, the numbers of images, and the schedule of the outer steps. In a step
of a masked model many visible tokens mean few hidden ones: it has several profiles, in each of which the two together are
little more than there are tokens. That bounds the largest tensors, and each is tuned at a shape of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from arinar.config import ArinarConfig
from arinar.files import check_folder, hidden_name, sweep
from arinar.runtime.backends.engines import (
    ENGINE_SUFFIX,
    ENGINES,
    Engine,
    EngineError,
    EngineInfo,
    Profile,
    architecture,
    engine_key,
    graph_hash,
    list_engines,
    sidecar_path,
)
from arinar.runtime.bundle import Bundle, BundleError, GraphInfo, file_sha256
from arinar.runtime.loop import DECODE_PIXELS
from arinar.schedule import mask_counts
from arinar.text import install_hint

from .builder import Progress, run_child
from .sizes import largest_tensor

DEFAULT_BATCH = (1, 8, 64)
DEFAULT_TIMEOUT = 3600.0

#: Profiles of a masked model's outer step.
BANDS = 4
#: Elements that a tensor must have fewer of, in TensorRT.
MOST_ELEMENTS = 2**31

INSTALL_HINTS = {
    "tensorrt": "`pip install tensorrt --extra-index-url https://pypi.nvidia.com` (NVIDIA's index holds its libraries)",
    "tensorrt_rtx": install_hint("tensorrt-rtx"),
}


Range = tuple[int, int, int]


@dataclass(frozen=True)
class Outcome:
    """What became of one graph: "built", "reused", "planned" (dry run) or "failed" (``error`` says why)."""

    graph: str
    state: str
    path: Path
    info: EngineInfo
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"graph": self.graph, "state": self.state, "path": str(self.path), "error": self.error} | {
            "engine": self.info.to_dict()
        }


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process sees."""

    name: str
    compute_capability: str
    driver: str


def build_engines(
    bundle: Bundle | str | os.PathLike[str],
    *,
    module: str = "tensorrt",
    precision: str | None = None,
    graphs: Sequence[str] | None = None,
    batch: Range = DEFAULT_BATCH,
    min_num_iter: int | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    version_compatible: bool = False,
    tf32: bool = True,
    compute_capability: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT,
    rebuild: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Build the engines that generation needs. One graph's failure does not stop the others.

    Parameters
    ----------
    bundle : a bundle, or its folder.
    module : import name of the library: "tensorrt" or "tensorrt_rtx".
    precision : which of the bundle's variants; None means fp16, or the only one.
    graphs : names; None means all that generation runs.
    batch : least, usual and largest number of images.
    min_num_iter : fewest outer steps that the engines must serve; fewer steps predict more tokens at a time. None
        means a quarter of the bundle's default.
    workspace : most bytes of scratch memory for one engine. None: what the device has.
    optimization_level : of the builder, 0 to 5. None: the library's own.
    timing_cache : folder that keeps measurements between builds, a file per library version and GPU.
    version_compatible : engines for later versions of the library too (larger, slower; not with tensorrt_rtx on a
        machine without a GPU).
    tf32 : let the VAE's decoder, where it is float32, round the factors of its products to 10 bits of mantissa.
    compute_capability : architectures to build for, e.g. ("8.9", "12.0"), where the library can target others than
        this machine's (tensorrt_rtx). () means its default.
    timeout : seconds for one graph.
    rebuild : also what has not changed.
    dry_run : plan only.
    progress : called with a line per stage.

    Raises BundleError for bad arguments, a missing library or a missing GPU. Failed builds are reported as outcomes.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    say = progress or (lambda line: None)
    precision = precision or ("fp16" if "fp16" in bundle.manifest.graphs else next(iter(bundle.manifest.graphs)))
    known = bundle.manifest.precision_graphs(precision)
    names = _chosen_graphs(known, graphs)
    check_batch(batch)
    if not dry_run:
        check_folder(bundle.folder / ENGINES)
    config, num_iter = bundle.manifest.config, bundle.manifest.defaults.num_iter
    fewest = _fewest_steps(min_num_iter, num_iter, config.seq_len)
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise BundleError(f"optimization_level is {optimization_level}; expected 0..5")

    library, gpu = probe(module), describe_gpu()
    targets = check_targets(library, gpu, compute_capability)
    axes = axis_ranges(config, batch, fewest, num_iter, least_visible(known))
    bundle.verify(sorted({file for name in names for file in (known[name].file, *known[name].weights)}))
    flags = {
        "strongly_typed": True,
        "workspace": workspace,
        "optimization_level": optimization_level,
        "version_compatible": version_compatible,
    }
    folder = bundle.folder / ENGINES / engine_key(module, library.version, targets, precision, version_compatible)
    cache = None if timing_cache is None else Path(timing_cache) / cache_name(module, library.version, targets)
    existing = {} if rebuild else {engine.path: engine for engine in list_engines(bundle)}
    outcomes: list[Outcome] = []
    for name in names:
        check_sizes(bundle.graph_path(known[name]), known[name], axes, batch)
    for number, name in enumerate(names, 1):
        info = EngineInfo(
            graph=name,
            precision=precision,
            module=module,
            version=library.version,
            compute_capability=targets,
            onnx_sha256=graph_hash(bundle, precision, name),
            opset=known[name].opset,
            batch=batch,
            profiles=profiles(known[name], axes),
            flags=flags | {"tf32": tf32 and known[name].bears_tf32},
            gpu=gpu.name if gpu else "",
            driver=gpu.driver if gpu else "",
        )
        path = folder / f"{name}{ENGINE_SUFFIX}"
        tell = partial(_prefixed, say, f"[{number}/{len(names)}] {name}")
        job = _job(bundle, known[name], info, cache)
        outcomes.append(_settle(job, info, path, existing.get(path), timeout, dry_run, tell))
    return outcomes


def _chosen_graphs(known: Mapping[str, GraphInfo], graphs: Sequence[str] | None) -> list[str]:
    if graphs is None:
        return [name for name in known if known[name].phase != "encode"]
    for name in graphs:
        if name not in known:
            raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(known)}")
    return list(graphs)


def _fewest_steps(min_num_iter: int | None, default: int, seq_len: int) -> int:
    if min_num_iter is None:
        return max(1, default // 4)
    if not 1 <= min_num_iter <= seq_len:
        raise BundleError(f"min_num_iter is {min_num_iter}; expected 1..{seq_len}")
    return min_num_iter


def _settle(
    job: dict[str, Any], info: EngineInfo, path: Path, old: Engine | None, timeout: float, dry_run: bool, say: Progress
) -> Outcome:
    """Keep the old engine, plan a new one, or build it."""
    if old is not None and unchanged(old, info):
        say("unchanged, kept")
        return Outcome(info.graph, "reused", path, old.info)
    if dry_run:
        say("would be built")
        return Outcome(info.graph, "planned", path, info)
    say("building")
    try:
        info = _build(job, info, path, timeout, say)
    except EngineError as error:
        say(f"FAILED: {error}")
        return Outcome(info.graph, "failed", path, info, str(error))
    say(f"{info.size / 1e6:.1f} MB in {info.seconds:.1f} s")
    return Outcome(info.graph, "built", path, info)


def _prefixed(say: Progress, label: str, line: str) -> None:
    say(f"{label}: {line}")


def check_batch(batch: Range) -> None:
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise BundleError(f"batch is {batch}; expected three numbers of images, least <= usual <= largest, from 1 on")


def cache_name(module: str, version: str, targets: Iterable[str]) -> str:
    """File of a timing cache: measurements hold for one library version and one GPU architecture only."""
    return f"{module}-{version}-{architecture(targets)}.timing"


def unchanged(old: Engine, wanted: EngineInfo) -> bool:
    """Whether an engine was built from the very inputs that are wanted, and is whole."""
    if old.info.inputs != wanted.inputs:
        return False
    try:
        old.verify()
    except EngineError:
        return False
    return True


# -------------------------------------------------------------------------------------------------- profiles


def axis_ranges(
    config: ArinarConfig, batch: Range, min_num_iter: int, num_iter: int, least_visible: int = 0
) -> list[dict[str, Range]]:
    """Least, usual and largest size of every symbolic axis of the graphs, but for N, which `profiles` finishes: by bands of
    visible tokens, which together admit every step.

    V visible, U still hidden, P predicted tokens of a step; B images; G branches; S inner cache; M drawn rows.
    """
    low, usual, high = batch
    length = config.seq_len
    if config.outer == "causal":
        predicted: Range = (1, 1, 1)
    else:
        middle = _counts(length, num_iter)
        most = max(max(_counts(length, steps)) for steps in range(min_num_iter, length + 1))
        predicted = (1, sorted(middle)[len(middle) // 2], most)
    chunk = max(1, DECODE_PIXELS // config.img_size**2)
    same: dict[str, Range] = {
        "B": batch,
        "G": (1, 2, 2),
        "S": (config.token_dim,) * 3,
        "M": (low, usual * predicted[1], high * predicted[2]),
        "P:drawn": predicted,  # by the head, whatever was visible
        # Decoded a bounded number at a time, the rest of a micro-batch may be a single image.
        "B:vae": (1, min(usual, chunk), min(high, chunk)),
    }
    return [same | band for band in _bands(length, predicted, least_visible)]


def _bands(length: int, predicted: Range, least_visible: int) -> list[dict[str, Range]]:
    """V, P and U of up to BANDS ranges of visible tokens; in each step the three add up to the number of tokens."""
    count = min(BANDS, length - least_visible)
    edges = [least_visible + band * (length - least_visible) // count for band in range(count + 1)]
    bands: list[dict[str, Range]] = []
    for first, after in itertools.pairwise(edges):
        last = after - 1
        middle, most = (first + last) // 2, min(predicted[2], length - first)
        usual = min(predicted[1], most, length - middle)
        hidden = max(0, length - last - most), length - middle - usual, length - first - 1
        bands.append({"V": (first, middle, last), "P": (1, usual, most), "U": hidden})
    return bands


def least_visible(graphs: Mapping[str, GraphInfo]) -> int:
    """Fewest visible tokens of an outer step: where there is a graph for first steps, the others see one at least."""
    return 1 if any(info.phase == "first" for info in graphs.values()) else 0


def _counts(seq_len: int, num_iter: int) -> list[int]:
    """Tokens that each step predicts."""
    masked = [*mask_counts(seq_len, num_iter), 0]
    return [before - after for before, after in itertools.pairwise(masked)]


def profiles(graph: GraphInfo, bands: Sequence[Mapping[str, Range]]) -> tuple[Profile, ...]:
    """Least, usual and largest shape of every input that has a symbolic axis, for every band in which they differ."""
    found: list[Profile] = []
    for axes in bands:
        profile = _profile(graph, _sizes(graph, axes))
        if profile and profile not in found:
            found.append(profile)
    return tuple(found)


def check_sizes(path: Path, graph: GraphInfo, bands: Sequence[Mapping[str, Range]], batch: Range) -> None:
    """Raise BundleError where a graph makes, at the largest sizes of a profile, a tensor that the library cannot hold."""
    for axes in bands:
        sizes = {axis: most for axis, (_, _, most) in _sizes(graph, axes).items()}
        largest: tuple[str, tuple[int, ...]] = ("", (0,))
        with contextlib.suppress(ValueError):  # no ONNX file: the library says so
            largest = largest_tensor(path, sizes)
        name, shape = largest
        if (elements := math.prod(shape)) >= MOST_ELEMENTS:
            fits = max(1, (MOST_ELEMENTS - 1) * batch[2] // elements)
            raise BundleError(
                f"graph {graph.name!r} makes of {batch[2]} images a tensor ({name!r}) of {' x '.join(map(str, shape))} = "
                f"{elements:,} elements; TensorRT takes fewer than 2^31. Build for at most {fits} images: "
                f"--batch {min(batch[0], fits)}:{min(batch[1], fits)}:{fits}"
            )


def _sizes(graph: GraphInfo, axes: Mapping[str, Range]) -> dict[str, Range]:
    """Sizes of a graph's axes: N is another number in each kind of graph."""
    names = {axis for tensor in graph.inputs for axis in tensor.shape if isinstance(axis, str)}
    sizes = dict(axes)
    if "V" not in names:
        sizes["P"] = axes["P:drawn"]
    if "M" in names:  # both branches of the drawn rows
        sizes["N"] = _times((2, 2, 2), axes["M"])
    elif graph.phase == "outer":
        sizes["N"] = _times(axes["G"], axes["B"])
    else:
        sizes["N"] = _times(axes["G"], sizes["P"], axes["B"])
    if graph.convolutional:
        sizes["B"] = axes["B:vae"]
    return sizes


def _profile(graph: GraphInfo, sizes: Mapping[str, Range]) -> Profile:
    found: Profile = {}
    for tensor in graph.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            low, usual, high = (
                tuple(sizes[axis][i] if isinstance(axis, str) else axis for axis in tensor.shape) for i in range(3)
            )
            found[tensor.name] = (low, usual, high)
    return found


def _times(*ranges: Range) -> Range:
    low, usual, high = (math.prod(sizes) for sizes in zip(*ranges, strict=True))
    return low, usual, high


# ---------------------------------------------------------------------------------------- library and machine


@dataclass(frozen=True)
class Library:
    """A TensorRT library: version, and the architectures it can be told to target (none: it builds for its GPU)."""

    module: str
    version: str
    targets: tuple[str, ...]


def probe(module: str) -> Library:
    """Ask a library what it is. Raises BundleError with the way to install it where it is missing or does not load."""
    hint = INSTALL_HINTS.get(module, f"install the package that provides {module!r}")
    if importlib.util.find_spec(module) is None:
        raise BundleError(f"{module} is not installed: {hint}")
    try:
        answer = run_child({"what": "probe", "module": module}, timeout=300.0)
    except EngineError as error:
        raise BundleError(f"{module} is installed but does not load ({error}). To install it: {hint}") from error
    return Library(module, answer["version"], tuple(answer["targets"]))


def check_targets(library: Library, gpu: Gpu | None, wanted: Sequence[str]) -> tuple[str, ...]:
    """The compute capabilities to build for; () is the library's portable default."""
    chosen = []
    for item in wanted:
        if item == "current" and gpu is None:
            raise BundleError("compute capability 'current' was asked for, and no NVIDIA GPU is visible here")
        chosen.append(gpu.compute_capability if item == "current" and gpu is not None else item)
    if library.targets:
        for item in chosen:
            if item not in library.targets:
                raise BundleError(
                    f"{library.module} {library.version} cannot build for compute capability {item!r}; "
                    f"it knows {', '.join(library.targets)}"
                )
        return tuple(sorted(set(chosen), key=float))
    if gpu is None:
        raise BundleError(
            f"{library.module} builds engines on the GPU that is to run them, and no NVIDIA GPU is visible here. "
            f"Run this on the target machine, or use --backend tensorrt-rtx, which builds anywhere"
        )
    if set(chosen) - {gpu.compute_capability}:
        raise BundleError(
            f"{library.module} builds for the GPU of this machine ({gpu.name}, compute capability "
            f"{gpu.compute_capability}), not for {', '.join(chosen)}: build there"
        )
    return (gpu.compute_capability,)


def describe_gpu() -> Gpu | None:
    """The first visible GPU, asked of the driver itself; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        calls = (
            cuda.cuInit(0),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # compute capability, major
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),  # minor
        )
    except (OSError, AttributeError):
        return None
    if any(calls):
        return None
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", _driver_version())


def _driver_version() -> str:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
            return ""
        return version.value.decode()
    except (OSError, AttributeError):
        return ""


# ---------------------------------------------------------------------------------------- parent and child


def _job(bundle: Bundle, graph: GraphInfo, info: EngineInfo, cache: Path | None) -> dict[str, Any]:
    return {
        "what": "build",
        "module": info.module,
        "onnx": str(bundle.graph_path(graph)),
        "profiles": info.profiles,
        "targets": list(info.compute_capability),
        "flags": info.flags,
        "timing_cache": None if cache is None else str(cache.absolute()),
    }


def _build(job: dict[str, Any], info: EngineInfo, path: Path, timeout: float, say: Progress) -> EngineInfo:
    """Build one engine and put it in place with its sidecar, all or nothing -> the finished sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.with_name(info.graph))
    scratch = hidden_name(path.with_name(info.graph), "partial")
    scratch.mkdir()
    try:
        made = scratch / path.name
        began = time.monotonic()
        notes = run_child(job | {"out": str(made.absolute())}, timeout, say)["notes"]
        for note in notes:
            say(note)
        info = replace(info, size=made.stat().st_size, sha256=file_sha256(made), seconds=round(time.monotonic() - began, 2))
        sidecar = sidecar_path(made)
        sidecar.write_text(info.to_json(), encoding="utf-8")
        # Without a sidecar an engine does not count: at no moment does one describe another's file.
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(made, path)
        os.replace(sidecar, sidecar_path(path))
        return info
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in (path.parent, path.parent.parent):  # of the key, of all engines
            with contextlib.suppress(OSError):  # there are others in it
                folder.rmdir()


__all__ = ["DEFAULT_BATCH", "Outcome", "axis_ranges", "build_engines", "describe_gpu", "probe", "profiles"]
