"""The bundle: a folder that holds everything a model needs to run, and the manifest that describes it.

The contract between `arinar.export`, which writes bundles, and the runtime, which loads them. Nothing in a bundle
holds an absolute path: it can be moved and copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from arinar.config import MAX_TOKENS, ArinarConfig, VaeConfig
from arinar.reading import parse_json, read_json
from arinar.schedule import check_cfg_schedule
from arinar.schemes import SCHEMES
from arinar.text import shown
from arinar.values import MOST_BYTES, conforming, entry, integer, items, mapping, number, text, truth

from .wire import external_locations

#: What is written, and what is read: 1 is what arinar 0.1 wrote.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST_NAME = "manifest.json"

#: When a graph runs: once per class; for every outer step; for every token; once the tokens are made; to read an image in.
PHASES = ("first", "outer", "head", "decode", "encode")
#: Whether a graph ends in a draw: not at all, one number, or one after another until the token is whole.
DRAWS = ("none", "one", "chain")
#: NumPy's names of the types that graphs' tensors have.
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
#: Letters of a file's name, which file systems take.
MOST_LETTERS = 255
#: Letters of a reason in a message: the config's own may quote a value of any length.
MOST_REASON = 300


class BundleError(ValueError):
    """A bundle that is damaged, foreign, or does not hold what was asked for. The message tells the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, NumPy dtype name and shape of a graph's input or output; a string in the shape is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Any, where: str = "tensor") -> TensorInfo:
        """Raises ValueError; ``where`` names what is read."""
        dtype = text(f"{where}.dtype", entry(where, data, "dtype"))
        if dtype not in DTYPES:
            raise ValueError(f"{where}.dtype is {shown(dtype)}; expected one of {', '.join(DTYPES)}")
        axes = items(f"{where}.shape", entry(where, data, "shape"))
        shape = tuple(axis if isinstance(axis, str) else integer(f"{where}.shape", axis) for axis in axes)
        return cls(text(f"{where}.name", entry(where, data, "name")), dtype, shape)


class GraphKind:
    """What follows from a graph's phase, draws and small."""

    phase: str
    draws: str
    small: bool

    @property
    def layered(self) -> bool:
        """Whether it holds layers of the transformers: what is quantised. (Drawing graphs are composed of such.)"""
        return self.phase in ("outer", "head") and self.draws == "none"

    @property
    def convolutional(self) -> bool:
        """Whether it is the autoencoder's."""
        return self.phase in ("decode", "encode") and not self.small

    @property
    def bears_tf32(self) -> bool:
        """Whether float32 products with factors of 10 bits of mantissa do: what makes pixels, which they change by a grey
        level (docs/gpu.md)."""
        return self.phase == "decode" and self.convolutional

    @property
    def bears_bfloat16(self) -> bool:
        """Whether products with factors of 8 bits of mantissa do: the outer network's and the autoencoder's. Not a head's: its
        draws come one after another, and what each is wrong by goes into all that follow."""
        return self.phase != "head" and not self.small


@dataclass(frozen=True)
class GraphInfo(GraphKind):
    """One ONNX graph: its file (relative to the bundle), opset, inputs, outputs, the files with its weights, what it is.

    ``cpu_file`` and ``cuda_file`` are the same graph, from the same weights, in the forms that ONNX Runtime's CPU and CUDA
    kernels run fastest, where those are others. ``phase`` is one of PHASES, ``draws`` one of DRAWS. ``small``: it is made of
    small operations (thousands, or trivial ones), for which sharing each out over threads costs more than the operation.
    """

    name: str
    file: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    phase: str
    draws: str = "none"
    small: bool = False
    weights: tuple[str, ...] = ()
    # Largest error against the step module when it was exported, measured in ONNX Runtime on the CPU.
    max_abs_err: float | None = None
    cpu_file: str | None = None
    cuda_file: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("phase", self.phase, PHASES), ("draws", self.draws, DRAWS)):
            if value not in known:
                raise ValueError(f"{name} of graph {self.name!r} is {shown(value)}; expected one of {', '.join(known)}")

    @property
    def cached(self) -> bool:
        """Whether a KV cache goes in or comes out."""
        return any(t.name.startswith(("past_key_values.", "present.")) for t in (*self.inputs, *self.outputs))

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the graph needs, in any form."""
        return (self.file, *filter(None, (self.cpu_file, self.cuda_file)), *self.weights)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self.file,
            "opset": self.opset,
            "inputs": [tensor.to_dict() for tensor in self.inputs],
            "outputs": [tensor.to_dict() for tensor in self.outputs],
            "phase": self.phase,
            "draws": self.draws,
            "small": self.small,
            "weights": list(self.weights),
            "max_abs_err": self.max_abs_err,
            "cpu_file": self.cpu_file,
            "cuda_file": self.cuda_file,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "graph") -> GraphInfo:
        """Raises ValueError; ``where`` names what is read."""

        def of(key: str) -> Any:
            return entry(where, data, key)

        def tensors(key: str) -> tuple[TensorInfo, ...]:
            found = items(f"{where}.{key}", of(key))
            return tuple(TensorInfo.from_dict(item, f"{where}.{key}[{place}]") for place, item in enumerate(found))

        def form(key: str) -> str | None:
            file = mapping(where, data).get(key)
            return None if file is None else text(f"{where}.{key}", file)

        error = mapping(where, data).get("max_abs_err")
        return cls(
            name=text(f"{where}.name", of("name")),
            file=text(f"{where}.file", of("file")),
            opset=integer(f"{where}.opset", of("opset"), 1, 1000),
            inputs=tensors("inputs"),
            outputs=tensors("outputs"),
            phase=text(f"{where}.phase", of("phase")),
            draws=text(f"{where}.draws", of("draws")),
            small=truth(f"{where}.small", of("small")),
            weights=tuple(text(f"{where}.weights", item) for item in items(f"{where}.weights", of("weights"))),
            max_abs_err=None if error is None else number(f"{where}.max_abs_err", error, 0),
            cpu_file=form("cpu_file"),
            cuda_file=form("cuda_file"),
        )


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str

    @classmethod
    def from_dict(cls, data: Any, where: str) -> FileInfo:
        """Raises ValueError; ``where`` names what is read."""
        size = integer(f"{where}.size", entry(where, data, "size"), 0, MOST_BYTES)
        return cls(size, text(f"{where}.sha256", entry(where, data, "sha256")))


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where the caller says nothing."""

    num_iter: int
    guidance_scale: float
    cfg_schedule: str = "linear"
    temperature: float = 1.0

    @classmethod
    def of(cls, config: ArinarConfig) -> Defaults:
        """Those that a model's config carries."""
        return cls(
            config.default_num_iter, config.default_guidance_scale, config.default_cfg_schedule, config.default_temperature
        )

    @classmethod
    def from_dict(cls, data: Any) -> Defaults:
        """Raises ValueError for a value of the wrong type or range."""
        made = cls(**conforming(cls, "defaults", data))
        integer("defaults.num_iter", made.num_iter, 1, MAX_TOKENS)
        number("defaults.guidance_scale", made.guidance_scale, 1)
        number("defaults.temperature", made.temperature, 0, strict=True)
        check_cfg_schedule(made.cfg_schedule, "defaults.cfg_schedule")
        return made


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says.

    ``graphs[precision][graph name]`` are the graphs, ``files[relative path]`` the size and hash of every file, ``law`` what
    the law of the head's draws depends on besides the config and is built into the graphs ("num_candidates", the N of
    the guided draw), ``schemes`` how a quantised variant computes, by its name, ``vae`` the autoencoder's shape,
    ``provenance`` where the weights came from and what wrote the bundle: for people; nothing is decided by it but
    whether two exports are of one model.
    """

    config: ArinarConfig
    graphs: dict[str, dict[str, GraphInfo]]
    files: dict[str, FileInfo]
    defaults: Defaults
    law: dict[str, int]
    schemes: dict[str, str] = field(default_factory=dict)
    vae: VaeConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        config, side = self.config, self.config.img_size
        return f"Manifest({config.outer} {config.head} model of {side} x {side}, {', '.join(self.graphs)})"

    def precision_graphs(self, precision: str) -> dict[str, GraphInfo]:
        """By name. Raises BundleError for a variant that the bundle has not."""
        if precision in SCHEMES and SCHEMES[precision].runs:
            return self.precision_graphs(SCHEMES[precision].runs)
        if precision not in self.graphs:
            known = precision in SCHEMES
            add = f"`arinar export CHECKPOINT --precision {precision} -o BUNDLE` adds them" if known else "choose one of those"
            raise BundleError(f"the bundle holds no {shown(precision)} graphs; it has {', '.join(self.graphs)}: {add}")
        return self.graphs[precision]

    def scheme(self, precision: str) -> str:
        """How a variant's graphs compute: as the variant of that name does. (One that was quantised may have any name.)"""
        scheme = self.schemes.get(precision, precision)
        if scheme not in SCHEMES:
            raise BundleError(
                f"the bundle's {precision} graphs compute by the scheme {scheme!r}; this version of arinar knows "
                f"{', '.join(SCHEMES)}. Install a newer one, or quantise the bundle again"
            )
        return scheme

    def to_json(self) -> str:
        data = {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "graphs": {p: {n: g.to_dict() for n, g in graphs.items()} for p, graphs in self.graphs.items()},
            "files": {name: asdict(info) for name, info in self.files.items()},
            "defaults": asdict(self.defaults),
            "law": self.law,
            "schemes": self.schemes,
            "vae": None if self.vae is None else self.vae.to_dict(),
            "provenance": self.provenance,
        }
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """`from_dict`, of a JSON text."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST_NAME} is not a bundle's manifest ({error}); export the model again") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Raises BundleError for what is not a manifest, or one of an unknown format version."""
        try:
            version = entry("it", data, "format_version")
        except ValueError as error:
            raise BundleError(f"{MANIFEST_NAME} is not a bundle's manifest ({error}); export the model again") from error
        if isinstance(version, bool) or version not in READABLE_VERSIONS:
            raise BundleError(
                f"the bundle has format version {shown(version)}; this version of arinar reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. "
                f"Install a version of arinar that matches, or export the model again"
            )
        try:
            manifest = cls._from_dict(_from_version_1(data) if version == 1 else data)
        except BundleError:
            raise
        # (What a version 1 lacks, or the config's own arithmetic cannot take, has not one type.)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            reason = reason if len(reason) <= MOST_REASON else f"{reason[:MOST_REASON]}..."
            raise BundleError(f"{MANIFEST_NAME} is damaged ({reason}); export the model again") from error
        return manifest

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises ValueError naming the entry that is missing, of a wrong type, or out of range."""

        def of(key: str) -> dict[str, Any]:
            return mapping(key, entry("it", data, key))

        config = ArinarConfig.from_dict(conforming(ArinarConfig, "config", of("config")))
        for name in of("files"):
            check_relative(name)
        vae = entry("it", data, "vae")
        manifest = cls(
            config=config,
            graphs={precision: _graphs(f"graphs.{precision}", graphs) for precision, graphs in of("graphs").items()},
            files={name: FileInfo.from_dict(info, f"files[{shown(name)}]") for name, info in of("files").items()},
            defaults=Defaults.from_dict(of("defaults")),
            law={name: integer(f"law.{name}", value, 1) for name, value in of("law").items()},
            schemes={name: text(f"schemes.{name}", scheme) for name, scheme in of("schemes").items()},
            vae=None if vae is None else VaeConfig.from_dict(conforming(VaeConfig, "vae", vae)),
            provenance=of("provenance"),
            format_version=entry("it", data, "format_version"),
        )
        if not manifest.graphs:
            raise ValueError("graphs has no entries; expected a precision's graphs")
        for graph in (graph for graphs in manifest.graphs.values() for graph in graphs.values()):
            for name in graph.files:
                if name not in manifest.files:
                    raise BundleError(f"graph {shown(graph.name)} needs {shown(name)}, which the manifest does not list")
        return manifest


def _graphs(where: str, data: Any) -> dict[str, GraphInfo]:
    graphs = {name: GraphInfo.from_dict(graph, f"{where}.{name}") for name, graph in mapping(where, data).items()}
    for name, graph in graphs.items():
        if graph.name != name:
            raise ValueError(f"{where}.{name}.name is {shown(graph.name)}; expected {name!r}")
    return graphs


# Version 1 told what a graph is by its name alone: phase, draws, small.
KINDS_OF_VERSION_1: dict[str, tuple[str, str, bool]] = {
    "outer_prefill": ("outer", "none", False),
    "outer_step": ("outer", "none", False),
    "inner_condition": ("head", "none", False),
    "inner_step": ("head", "none", False),
    "mixture_sample": ("head", "one", True),
    "mixture_sample_guided": ("head", "one", True),
    "inner_token": ("head", "chain", True),
    "inner_token_guided": ("head", "chain", True),
    "tokens_to_latents": ("decode", "none", True),
    "vae_decoder": ("decode", "none", False),
    "vae_encoder": ("encode", "none", False),
}


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 in the words of version 2."""

    def graph(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        phase, draws, small = KINDS_OF_VERSION_1[name]
        return dict(entry) | {"phase": phase, "draws": draws, "small": small}

    provenance = data["provenance"]
    quantized = provenance.get("quantization", {})
    return dict(data) | {
        "graphs": {p: {n: graph(n, g) for n, g in graphs.items()} for p, graphs in data["graphs"].items()},
        "law": {"num_candidates": data["num_candidates"]},
        "schemes": {name: entry.get("scheme", name) for name, entry in quantized.items()},
        "vae": provenance.get("vae_config"),
        "provenance": {name: value for name, value in provenance.items() if name != "vae_config"},
    }


def check_relative(name: str) -> None:
    """Refuse paths that could leave the bundle's folder."""
    path = PurePosixPath(name)
    plain = name and not any(mark in name for mark in "\\:\0") and max(map(len, path.parts), default=0) <= MOST_LETTERS
    if not plain or path.is_absolute() or ".." in path.parts:
        raise BundleError(f"the manifest names the file {shown(name)}, which does not lie inside the bundle; do not trust it")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read the manifest. Raises BundleError when ``path`` is not a bundle this version can read."""
        folder = Path(path)
        file = folder / MANIFEST_NAME
        if not folder.is_dir() or not file.is_file():
            what = "is not a folder" if folder.exists() and not folder.is_dir() else f"holds no {MANIFEST_NAME}"
            what = what if folder.exists() else "does not exist"
            raise BundleError(f"{folder} is not a bundle: it {what}. `arinar export CHECKPOINT -o {folder}` makes one")
        try:
            data = read_json(file)
        except UnicodeDecodeError as error:
            raise BundleError(f"{file} is not text; export the model again") from error
        except ValueError as error:
            raise BundleError(f"{file} is not a bundle's manifest ({error}); export the model again") from error
        bundle = cls(folder, Manifest.from_dict(data))
        bundle.path(MANIFEST_NAME)
        return bundle

    @property
    def precisions(self) -> tuple[str, ...]:
        """The variants that it holds, by name: what `Pipeline.load` takes as ``precision``."""
        return tuple(self.manifest.graphs)

    def size(self, precision: str | None = None) -> int:
        """Bytes of the files that the manifest lists: all, or those of a precision's graphs. Engines are not among them."""
        graphs = self.manifest.precision_graphs(precision).values() if precision else ()
        names = {file for graph in graphs for file in graph.files} if precision else self.manifest.files
        return sum(self.manifest.files[name].size for name in names)

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r}, {', '.join(self.precisions)}, {self.size() / 1e6:.1f} MB)"

    def path(self, name: str) -> Path:
        """Absolute path of a file of the bundle, checked to lie inside it."""
        check_relative(name)
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError):  # a link that leads to itself
            inside = False
        if not inside:
            raise BundleError(f"{name!r} leads out of the bundle {self.folder}; do not trust it")
        return path

    def graph_path(self, graph: GraphInfo, form: str | None = None) -> Path:
        """Absolute path of a graph's file (``form``: "cpu" or "cuda", the one for those kernels of ONNX Runtime, where it has
        one), for a program that is to read it, which follows what the file says of where weights lie.

        Raises BundleError where that is not among the graph's ``weights``, or is no plain file of this folder's own.
        """
        name = {"cpu": graph.cpu_file, "cuda": graph.cuda_file}.get(form or "") or graph.file
        path = self.path(name)
        if path.suffix != ".onnx":  # ONNX Runtime tells other formats by their names
            raise BundleError(f"graph {graph.name!r} is the file {name!r}; expected *.onnx: export the model again")
        try:
            locations = external_locations(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror or error}); export the model again") from error
        except ValueError as error:
            raise BundleError(f"{path} is no whole ONNX file ({error}); copy the bundle again, or export again") from error
        for location in sorted(locations):
            # (An asterisk: ONNX Runtime has names for addresses in memory.)
            inside = location and not any(mark in location for mark in "*:\\\0") and ".." not in PurePosixPath(location).parts
            weights = str(PurePosixPath(name).parent / location)
            if not inside or weights not in graph.weights:
                known = ", ".join(graph.weights) or "none"
                raise BundleError(
                    f"{path} has weights in the file {location!r}; the manifest lists {known} for graph {graph.name!r}: "
                    f"do not trust the bundle"
                )
            self._check_own(weights)
        return path

    def _check_own(self, name: str) -> None:
        """Raise BundleError where a file has a name outside the bundle: is a link, lies behind one, or is linked to."""
        path = self.path(name)
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy the bundle again, or export the model again")
        if path.resolve() != self.folder.resolve() / name:
            raise BundleError(
                f"{path} is a link, or lies behind one; copy the bundle with its files in place of links (cp -rL)"
            )
        status = path.stat()
        if status.st_nlink > 1:
            own = [self.folder / other for other in self.manifest.files]
            links = sum(other.is_file() and other.lstat().st_ino == status.st_ino for other in own)
            if status.st_nlink > links:
                raise BundleError(f"{path} has another name outside the bundle (a hard link); copy the bundle (cp -r)")

    def verify(self, names: list[str] | None = None, progress: Callable[[str], None] | None = None) -> None:
        """Compare size and hash of files (all, or the named ones). Raises BundleError naming the first bad one."""
        for name in sorted(self.manifest.files) if names is None else names:
            path, info = self.path(name), self.manifest.files[name]
            if progress:
                progress(name)
            try:
                size = path.stat().st_size if path.is_file() else None
                digest = file_sha256(path) if size == info.size else ""
            except FileNotFoundError:  # since a moment ago
                size = None
            if size is None:
                raise self.fault(f"{path} is missing; copy the bundle again, or export the model again")
            if size != info.size:
                raise self.fault(
                    f"{path} has {size} bytes; the manifest says {info.size}. Copy the bundle again, or export again"
                )
            if digest != info.sha256:
                raise self.fault(
                    f"{path} is damaged: its SHA-256 is {digest[:16]}..., the manifest says {info.sha256[:16]}... "
                    f"Copy the bundle again, or export again"
                )

    def fault(self, message: str) -> BundleError:
        """The error for a file that cannot be used: it may be gone because the bundle has changed since it was opened."""
        try:
            changed = Bundle.open(self.folder).manifest != self.manifest
        except BundleError:
            changed = False
        if changed:
            return BundleError(f"another command has changed {self.folder} since it was opened; load the bundle again")
        return BundleError(message)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_info(path: Path) -> FileInfo:
    return FileInfo(path.stat().st_size, file_sha256(path))
