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

from arinar.config import MAX_TOKENS, ArinarConfig, VaeConfig, check_integer, check_number
from arinar.reading import MAX_JSON, parse_json
from arinar.schemes import SCHEMES

#: What is written, and what is read: 1 is what arinar 0.1 wrote.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST_NAME = "manifest.json"

#: When a graph runs: for every outer step; for every token; once the tokens are made; to read an image in.
PHASES = ("outer", "head", "decode", "encode")
#: Whether a graph ends in a draw: not at all, one number, or one after another until the token is whole.
DRAWS = ("none", "one", "chain")


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
    def from_dict(cls, data: Mapping[str, Any]) -> TensorInfo:
        axes = [axis if isinstance(axis, str) else check_integer("an axis", axis, 0, 1 << 31) for axis in data["shape"]]
        return cls(str(data["name"]), str(data["dtype"]), tuple(axes))


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


@dataclass(frozen=True)
class GraphInfo(GraphKind):
    """One ONNX graph: its file (relative to the bundle), opset, inputs, outputs, the files with its weights, what it is.

    ``cpu_file`` is the same graph, from the same weights, in the form that ONNX Runtime's CPU kernels run fastest,
    where that is another one. ``phase`` is one of PHASES, ``draws`` one of DRAWS. ``small``: it is made of small
    operations (thousands, or trivial ones), for which sharing each out over threads costs more than the operation.
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

    def __post_init__(self) -> None:
        for name, value, known in (("phase", self.phase, PHASES), ("draws", self.draws, DRAWS)):
            if value not in known:
                raise ValueError(f"{name} of graph {self.name!r} is {value!r}; expected one of {', '.join(known)}")

    @property
    def cached(self) -> bool:
        """Whether a KV cache goes in or comes out."""
        return any(t.name.startswith(("past_key_values.", "present.")) for t in (*self.inputs, *self.outputs))

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the graph needs, in any form."""
        return (self.file, *([self.cpu_file] if self.cpu_file else []), *self.weights)

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
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphInfo:
        error = data.get("max_abs_err")
        return cls(
            name=str(data["name"]),
            file=str(data["file"]),
            opset=check_integer("opset", data["opset"], 1, 1000),
            inputs=tuple(TensorInfo.from_dict(item) for item in data["inputs"]),
            outputs=tuple(TensorInfo.from_dict(item) for item in data["outputs"]),
            phase=str(data["phase"]),
            draws=str(data["draws"]),
            small=bool(data["small"]),
            weights=tuple(str(item) for item in data["weights"]),
            max_abs_err=None if error is None else check_number("max_abs_err", error, 0, 1e30),
            cpu_file=None if data.get("cpu_file") is None else str(data["cpu_file"]),
        )


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FileInfo:
        return cls(check_integer("size", data["size"], 0, 1 << 62), str(data["sha256"]))


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where the caller says nothing."""

    num_iter: int
    guidance_scale: float
    cfg_schedule: str = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_integer("num_iter", self.num_iter, 1, MAX_TOKENS)
        check_number("guidance_scale", self.guidance_scale, 0, 1e6)
        check_number("temperature", self.temperature, 0, 1e6)

    @classmethod
    def of(cls, config: ArinarConfig) -> Defaults:
        """Those that a model's config carries."""
        return cls(
            config.default_num_iter, config.default_guidance_scale, config.default_cfg_schedule, config.default_temperature
        )


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

    def precision_graphs(self, precision: str) -> dict[str, GraphInfo]:
        if precision not in self.graphs:
            raise BundleError(
                f"the bundle holds no {precision!r} graphs; it has {', '.join(self.graphs)}. "
                f"`arinar export --precision {precision}` adds them"
            )
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
        """Raises BundleError for what is not a manifest, or one of an unknown format version."""
        try:
            data = parse_json(text)
            version = data["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not a bundle's manifest ({error}); export the model again") from error
        if version not in READABLE_VERSIONS:
            raise BundleError(
                f"the bundle has format version {version}; this version of arinar reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. "
                f"Install a version of arinar that matches, or export the model again"
            )
        try:
            if version == 1:
                data = _from_version_1(data)
            manifest = cls(
                config=ArinarConfig.from_dict(data["config"]),
                graphs={p: {n: GraphInfo.from_dict(g) for n, g in graphs.items()} for p, graphs in data["graphs"].items()},
                files={
                    n: FileInfo(check_integer("size", f["size"], 0, 1 << 62), str(f["sha256"]))
                    for n, f in data["files"].items()
                },
                defaults=Defaults(**data["defaults"]),
                law={str(name): check_integer(name, value, 1, 1 << 20) for name, value in data["law"].items()},
                schemes={str(name): str(scheme) for name, scheme in data["schemes"].items()},
                vae=None if data["vae"] is None else VaeConfig.from_dict(data["vae"]),
                provenance=dict(data["provenance"]),
                format_version=version,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST_NAME} is damaged ({error!r}); export the model again") from error
        for name in manifest.files:
            check_relative(name)
        for graphs in manifest.graphs.values():
            for graph in graphs.values():
                for name in graph.files:
                    if name not in manifest.files:
                        raise BundleError(f"graph {graph.name!r} needs {name!r}, which the manifest does not list")
        return manifest


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
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise BundleError(f"the manifest names the file {name!r}, which does not lie inside the bundle; do not trust it")


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
            if (size := file.stat().st_size) > MAX_JSON:
                raise BundleError(f"{file} has {size:,} bytes; expected at most {MAX_JSON:,}: export the model again")
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{file} is not text; export the model again") from error
        return cls(folder, Manifest.from_json(text))

    def path(self, name: str) -> Path:
        """Absolute path of a file of the bundle, checked to lie inside it."""
        check_relative(name)
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{name!r} leads out of the bundle {self.folder}; do not trust it")
        return path

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
