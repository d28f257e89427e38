"""Which of a bundle's TensorRT engines fit this machine: their layout, their sidecars, and the rules.

Layout, written by `arinar build` (`arinar.export.engine`), read by the runtime; the manifest does not list engines::

    engines/<key>/<graph>.engine   the serialized engine
    engines/<key>/<graph>.json     its sidecar, an EngineInfo; written last: an engine without one is unfinished
    engines/kernels/*.cubin        compiled kernels (`arinar.runtime.kernels.compiler`), for whatever GPU

``<key>`` is :func:`engine_key`: library and version, GPU architecture, precision. Engines of one bundle for several
GPUs and versions therefore live side by side. What decides is the sidecar; the key only keeps them apart.

Plain Python: neither NumPy nor a TensorRT library is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arinar.reading import check_regular, parse_json
from arinar.text import shown
from arinar.values import MOST_BYTES, conforming, entry, integer, mapping

from ..bundle import Bundle, BundleError, file_sha256

ENGINES, ENGINE_SUFFIX, SIDECAR_SUFFIX = "engines", ".engine", ".json"
SIDECAR_VERSION = 2

#: Backend name of `arinar build` -> the library (import name) that builds its engines.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
#: Libraries that only run engines, and only those built version compatible by the named one.
RUNTIME_ONLY = {"tensorrt_lean": "tensorrt", "tensorrt_dispatch": "tensorrt"}
#: Least compute capability of engines that were built for none in particular.
PORTABLE_FROM = "8.0"

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


class EngineError(BundleError):
    """No engine of the bundle runs here. The message says why and names the `arinar build` command that mends it."""


@dataclass(frozen=True)
class EngineInfo:
    """A sidecar: what an engine was built from, for, and with.

    module, version : import name and exact version of the library that built it.
    compute_capability : GPU architectures it runs on, as "9.0". Empty: the library's own portable default (RTX only).
    gpu, driver : of the machine that built it; empty where there was none.
    onnx_sha256 : `graph_hash` of the graph, weights included.
    batch : least, best and largest number of images.
    profiles : ranges of shapes that it was tuned for, one after another: per input (least, best, largest) shape.
    flags : options of the build that change the engine.
    """

    graph: str
    precision: str
    module: str
    version: str
    compute_capability: tuple[str, ...]
    onnx_sha256: str
    opset: int
    batch: tuple[int, int, int]
    profiles: tuple[Profile, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    gpu: str = ""
    driver: str = ""
    size: int = 0
    sha256: str = ""
    seconds: float = 0.0
    sidecar_version: int = SIDECAR_VERSION

    @property
    def version_compatible(self) -> bool:
        return bool(self.flags.get("version_compatible"))

    @property
    def inputs(self) -> dict[str, Any]:
        """What went into the build. Equal inputs: no need to build again."""
        made = ("size", "sha256", "seconds", "driver")
        return {name: value for name, value in self.to_dict().items() if name not in made}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples -> lists, as they come back from a file
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineInfo:
        """Raises ValueError for what is not a sidecar of this version."""
        data = mapping("the sidecar", parse_json(text))
        if (found := entry("the sidecar", data, "sidecar_version")) != SIDECAR_VERSION:
            raise ValueError(
                f"its sidecar has version {shown(found)}; this version of arinar reads {SIDECAR_VERSION}: build it again"
            )
        size = integer("size", data.get("size", 0), 0, MOST_BYTES)
        made = cls(**conforming(cls, "the sidecar", data | {"size": 0}) | {"size": size})
        for name, shapes in (item for profile in made.profiles for item in profile.items()):
            if len({len(shape) for shape in shapes}) != 1:
                raise ValueError(f"profiles.{name} has shapes of different ranks")
        return made


@dataclass(frozen=True)
class Engine:
    """An engine that lies in a bundle: the file, and its sidecar."""

    path: Path
    info: EngineInfo

    def verify(self) -> None:
        """Compare the file with its sidecar's hash. Raises EngineError."""
        if file_sha256(self.path) != self.info.sha256:
            raise EngineError(f"engine {self.path} is damaged: its SHA-256 is not the sidecar's; build it again")


def architecture(compute_capability: Iterable[str]) -> str:
    """("8.9", "12.0") -> "sm89+sm120"; nothing -> "portable"."""
    return "+".join(f"sm{item.replace('.', '')}" for item in compute_capability) or "portable"


def engine_key(
    module: str, version: str, compute_capability: Iterable[str], precision: str, version_compatible: bool = False
) -> str:
    """Name of the folder under ``engines/``, e.g. "tensorrt-11.4.0.106-sm90-fp16"."""
    parts = [module, version, architecture(compute_capability), precision]
    return "-".join(parts + (["vc"] if version_compatible else []))


def graph_hash(bundle: Bundle, precision: str, graph: str) -> str:
    """SHA-256 that stands for a graph with its weights, out of the manifest's hashes of those files."""
    info = bundle.manifest.precision_graphs(precision)[graph]
    files = bundle.manifest.files
    text = "\n".join(files[name].sha256 for name in (info.file, *info.weights))
    return hashlib.sha256(text.encode()).hexdigest()


def build_command(bundle: Bundle, module: str, precision: str, version_compatible: bool = False) -> str:
    """The command that makes the engines which are wanted."""
    module = RUNTIME_ONLY.get(module, module)
    backend = next((name for name, value in MODULES.items() if value == module), module)
    command = f"arinar build {bundle.folder} --backend {backend} --precision {precision}"
    return command + (" --version-compatible" if version_compatible else "")


def sidecar_path(engine: Path) -> Path:
    return engine.with_suffix(SIDECAR_SUFFIX)


def kernel_folder(bundle: Bundle) -> Path:
    """Where compiled kernels are kept."""
    return bundle.folder / ENGINES / "kernels"


def list_engines(bundle: Bundle, problems: list[str] | None = None) -> list[Engine]:
    """Every engine of the bundle that has a readable sidecar; what is wrong with the others goes to ``problems``."""
    found: list[Engine] = []
    folder = bundle.folder / ENGINES
    for sidecar in sorted(folder.glob(f"*/*{SIDECAR_SUFFIX}")) if folder.is_dir() else []:
        path = sidecar.with_suffix(ENGINE_SUFFIX)
        try:
            for file in (path, sidecar):  # links that lead out of the bundle
                bundle.path(file.relative_to(bundle.folder).as_posix())
            check_regular(sidecar)
            info = EngineInfo.from_json(sidecar.read_text(encoding="utf-8"))
            size = path.stat().st_size
            if size != info.size:
                raise ValueError(f"the engine has {size} bytes, its sidecar says {info.size}")
        except (ValueError, OSError) as error:
            if problems is not None:
                problems.append(f"{sidecar.parent.name}/{sidecar.stem}: {error}")
            continue
        found.append(Engine(path, info))
    return found


def mismatch(info: EngineInfo, *, module: str, version: str, compute_capability: str, onnx_sha256: str) -> str | None:
    """Why this engine cannot run on a machine with that library and GPU, or None when it can.

    compute_capability : of the GPU, e.g. "9.0".
    """
    builder = RUNTIME_ONLY.get(module, module)
    if info.module != builder:
        return f"built with {info.module}, this is {module}"
    if module in RUNTIME_ONLY and not info.version_compatible:
        return f"{module} runs only engines built with --version-compatible"
    if info.version_compatible:
        # A version compatible engine runs on its own and on later versions.
        if _numbers(version) < _numbers(info.version):
            return f"built with {info.module} {info.version}, newer than the {version} that is installed"
    elif info.version != version:
        return f"built with {info.module} {info.version}, {version} is installed"
    if info.compute_capability and compute_capability not in info.compute_capability:
        return f"built for compute capability {', '.join(info.compute_capability)}, this GPU has {compute_capability}"
    if not info.compute_capability and _numbers(compute_capability) < _numbers(PORTABLE_FROM):
        return f"portable engines run from compute capability {PORTABLE_FROM} on, this GPU has {compute_capability}"
    if info.onnx_sha256 != onnx_sha256:
        return "built from another export of the graph"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if re.fullmatch("[0-9]{1,18}", part)]


def find_engines(
    bundle: Bundle,
    graphs: Iterable[str],
    *,
    module: str,
    version: str,
    compute_capability: str,
    precision: str,
) -> dict[str, Engine]:
    """The engines that run these graphs here, by graph name.

    Parameters
    ----------
    graphs : names that are needed.
    module, version : the library that is to run them, e.g. "tensorrt", "11.4.0.106"; `tensorrt_lean` and
        `tensorrt_dispatch` take version compatible engines of `tensorrt`.
    compute_capability : of the GPU, e.g. "9.0".

    Raises EngineError naming the first graph that has none, why each candidate was refused, and the command to run.
    Sizes are checked here; :meth:`Engine.verify` checks the hash of one.
    """
    problems: list[str] = []
    engines = [engine for engine in list_engines(bundle, problems) if engine.info.precision == precision]
    chosen: dict[str, Engine] = {}
    for graph in graphs:
        expected = graph_hash(bundle, precision, graph)
        refused: list[str] = []
        for engine in engines:
            if engine.info.graph != graph:
                continue
            why = mismatch(
                engine.info,
                module=module,
                version=version,
                compute_capability=compute_capability,
                onnx_sha256=expected,
            )
            if why is not None:
                refused.append(f"{engine.path.parent.name}: {why}")
            elif graph not in chosen or _preferred(engine.info) > _preferred(chosen[graph].info):
                chosen[graph] = engine
        if graph not in chosen:
            damaged = [item for item in problems if item.partition(": ")[0].endswith(f"/{graph}")]
            reasons = "; ".join(refused + damaged) or "none has been built"
            lean = module in RUNTIME_ONLY
            # (What generation does not run is not built unless asked for.)
            only = f" --graph {graph}" if bundle.manifest.precision_graphs(precision)[graph].phase == "encode" else ""
            where = f"with {RUNTIME_ONLY[module]} installed" if lean else "on this machine"
            raise EngineError(
                f"no {precision} engine of graph {graph!r} runs on {module} {version} and compute capability "
                f"{compute_capability} ({reasons}). Run `{build_command(bundle, module, precision, lean)}{only}` {where}"
            )
    return chosen


def _preferred(info: EngineInfo) -> tuple[bool, int, list[int]]:
    """Of several that run: not the version compatible one (slower), made for fewer GPUs, the newer version."""
    return not info.version_compatible, -(len(info.compute_capability) or 99), _numbers(info.version)


__all__ = [
    "ENGINES",
    "MODULES",
    "RUNTIME_ONLY",
    "Engine",
    "EngineError",
    "EngineInfo",
    "build_command",
    "engine_key",
    "find_engines",
    "graph_hash",
    "list_engines",
    "mismatch",
]
