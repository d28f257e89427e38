"""A trained model and its VAE -> a bundle that runs without PyTorch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import arinar
from arinar.config import ArinarConfig
from arinar.model import Arinar
from arinar.runtime.bundle import (
    Bundle,
    BundleError,
    Defaults,
    GraphInfo,
    Manifest,
    file_info,
)
from arinar.runtime.wire import external_locations
from arinar.schemes import QUANTIZED, TRACED
from arinar.vae import AutoencoderKL

from .cpu import cpu_path, write_cpu_form
from .cuda import cuda_path, finish_cuda_form
from .folder import check_bundle_folder, locked, place, scratch_folder, write_manifest
from .graphs import HEADS, cuda_forms, graph_specs
from .spec import Array, ExportError, GraphSpec
from .steps import half_precision, half_precision_vae
from .trace import DEFAULT_OPSET, OPSETS, WeightStore, exact_reference, export_graph, validate_graph, write_model

Progress = Callable[[str], None]
Reference = Callable[[dict[str, Array]], Sequence[Array]]

# Largest error of a float16 graph against the float32 module, relative to outputs above 1. Measured on random inputs:
# 2e-3 (demo models), 4e-3 (the published size, random weights).
FP16_ATOL = 2e-2

# The file beside the graphs of a precision that holds their large weights. Those of the autoencoder's graphs lie apart,
# so that a variant that shares them need not read the rest.
WEIGHTS_NAME = "weights.data"

# Entries of the provenance that tell one model from another.
WEIGHT_HASHES = ("weights_sha256", "vae_weights_sha256")


def export_bundle(
    model: Arinar,
    vae: AutoencoderKL,
    out: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    vae_precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    law: Mapping[str, int] | None = None,
    untrained: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a bundle, or add a precision to one of the same model.

    Every graph is traced, checked and run in ONNX Runtime against its float32 module at several batch sizes; the
    bundle appears under its final name only when all of them agree.

    Parameters
    ----------
    model, vae : in float32; they are not changed.
    out : folder of the bundle; must not exist, be empty, or be a bundle of the same model (the precision is added).
    precision : of the transformer graphs: fp32, or fp16 (float16 weights, GEMMs and caches; norms, softmax, mixture
        head and sampling in float32; tokens, z and mixture parameters are float32 in either).
    vae_precision : of the VAE graphs in an fp16 variant. fp32 shares the graphs of the bundle's fp32 variant where it
        has one; fp16 is half the size, for autoencoders whose activations leave room.
    opset : of ONNX. From 24 on a causal model's step writes its KV cache in place where the backend can.
    law : what the law of the head's draws depends on besides the config; default the published (of a Gaussian mixture head
        ``num_candidates``, the N of the guided draw).
    untrained : the weights are random: graphs that draw may differ from their reference, and are only reported. (Draws from
        the laws of an untrained model may jump at a rounding error; parity shows how often.)
    overwrite : replace an existing bundle, or an existing precision of it.
    provenance : recorded in the manifest (where the weights came from).
    progress : called with a line per stage.

    Raises
    ------
    ValueError, BundleError : bad arguments, or ``out`` cannot be written to.
    ExportError : a graph does not compute what its module computes. Nothing is left behind.
    """
    if precision not in TRACED:
        raise ValueError(f"precision is {precision!r}; this exporter traces fp32 and fp16 (others: {QUANTIZED})")
    if vae_precision not in ("fp32", "fp16"):
        raise ValueError(f"vae_precision is {vae_precision!r}; choose one of fp32, fp16")
    if vae_precision != "fp32" and precision == "fp32":
        raise ValueError("vae_precision fp16 belongs to an fp16 variant; its transformer graphs would be fp32")
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; choose one of {', '.join(map(str, OPSETS))}")
    check_match(model.config, vae)
    say = progress or (lambda line: None)
    out = Path(out)
    check_bundle_folder(out)
    hashes = {"weights_sha256": weights_sha256(model), "vae_weights_sha256": weights_sha256(vae)}
    provenance = dict(provenance or {}) | hashes
    law = dict(law or HEADS[model.config.head].LAW)
    existing = _existing(out, model.config, precision, law, overwrite, provenance)
    shared: dict[str, GraphInfo] = {}
    if existing is not None and precision != "fp32" and vae_precision == "fp32":
        shared = _shared_graphs(existing.manifest, opset)

    _quiet_exporter()
    with scratch_folder(out) as scratch:
        folder = scratch / "graphs" / precision
        folder.mkdir(parents=True)
        variant = _Variant.make(model, vae, law, precision, vae_precision, opset)
        graphs = _write_graphs(variant, folder, shared, untrained, say)
        files = {path.relative_to(scratch).as_posix(): file_info(path) for path in sorted(folder.iterdir())}
        manifest = Manifest(
            config=model.config,
            graphs={precision: graphs},
            files=files,
            defaults=Defaults.of(model.config),
            law=law,
            vae=vae.config,
            provenance={"arinar": arinar.__version__, "torch": torch.__version__, "onnx": onnx.__version__} | provenance,
        )
        with locked(out, say):
            # Meanwhile another command may have made the bundle, changed it, or added this very precision.
            existing = _existing(out, model.config, precision, law, overwrite, provenance)
            if shared and (existing is None or not shared.items() <= _shared_graphs(existing.manifest, opset).items()):
                raise BundleError(f"another command has replaced the fp32 graphs of {out} meanwhile; run this one again")
            manifest = place(folder, out, manifest, add=existing is not None)
    total = sum(info.size for info in files.values())
    say(f"{out}: {len(graphs)} {precision} graphs, {total / 1e6:.1f} MB")
    return manifest


def check_match(config: ArinarConfig, vae: AutoencoderKL) -> None:
    """Raise ValueError when a model and a VAE do not belong together."""
    for name, have, want in (
        ("latent channels", vae.config.embed_dim, config.vae_embed_dim),
        ("stride", vae.config.stride, config.vae_stride),
    ):
        if have != want:
            raise ValueError(f"the VAE's {name} is {have}; the model expects {want}: give the VAE it was trained with")


def _existing(
    out: Path,
    config: ArinarConfig,
    precision: str,
    law: Mapping[str, int],
    overwrite: bool,
    provenance: Mapping[str, Any] | None,
) -> Bundle | None:
    """The bundle to add to, or None for a new one; refuses to touch what is not ours."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError as error:
        raise BundleError(f"{out} exists and is not a readable bundle ({error}); choose another output folder") from error
    recorded, given = bundle.manifest.provenance, dict(provenance or {})
    names = WEIGHT_HASHES if "weights_sha256" in recorded else ("checkpoint_sha256",)
    same = (
        bundle.manifest.config == config
        and bundle.manifest.law == law
        and all(recorded.get(name) == given.get(name) for name in names)
    )
    if not same:
        if overwrite:
            return None
        raise BundleError(f"{out} is a bundle of another model; choose another output folder, or pass --overwrite")
    if precision in bundle.manifest.graphs and not overwrite:
        raise BundleError(f"{out} already holds {precision} graphs of this model; pass --overwrite to replace them")
    return bundle


def weights_sha256(module: torch.nn.Module) -> str:
    """SHA-256 over names and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _shared_graphs(manifest: Manifest, opset: int) -> dict[str, GraphInfo]:
    """The float32 VAE graphs that a bundle of the same model and VAE holds already."""
    if "vae_weights_sha256" not in manifest.provenance:
        return {}
    graphs = manifest.graphs.get("fp32", {})
    return {name: graph for name, graph in graphs.items() if graph.convolutional and graph.opset == opset}


@dataclass(frozen=True)
class _Variant:
    """What is to be written: the model in its precision and in float32, the graphs' precision and opset."""

    specs: dict[str, GraphSpec]
    cuda: dict[str, GraphSpec]  # graphs that have another form for CUDA
    exact: dict[str, GraphSpec]
    config: ArinarConfig
    precision: str
    opset: int

    @classmethod
    def make(
        cls, model: Arinar, vae: AutoencoderKL, law: Mapping[str, int], precision: str, vae_precision: str, opset: int
    ) -> _Variant:
        exact = specs = graph_specs(model, vae, law, opset)
        cuda: dict[str, GraphSpec] = {}
        if precision == "fp16":
            half = half_precision(model, HEADS[model.config.head].float32_islands)
            small = half_precision_vae(vae) if vae_precision == "fp16" else vae
            specs, cuda = graph_specs(half, small, law, opset), cuda_forms(half)
            halved = {n for n, s in specs.items() if vae_precision == "fp16" and s.convolutional}
            loose = halved | {n for n, s in specs.items() if s.layered or s.phase == "first"}
            specs = {n: replace(s, atol=FP16_ATOL) if n in loose else s for n, s in specs.items()}
            cuda = {n: replace(s, atol=FP16_ATOL) for n, s in cuda.items()}
        return cls(specs, cuda, exact, model.config, precision, opset)

    def reference(self, spec: GraphSpec) -> Reference | None:
        """What a graph must compute, where that is not its own module."""
        if spec.name not in self.exact:
            made: Reference = HEADS[self.config.head].reference(spec.name, self.exact, self.config)
            return made
        return None if self.precision == "fp32" else exact_reference(spec, self.exact[spec.name])


def _write_graphs(
    variant: _Variant, folder: Path, shared: Mapping[str, GraphInfo], untrained: bool, say: Progress
) -> dict[str, GraphInfo]:
    """Trace, compose and prove every graph that is not shared with another precision."""
    traced = [spec for spec in variant.specs.values() if spec.name not in shared]
    composed = HEADS[variant.config.head].COMPOSED
    total = len(traced) + len(composed)
    paths = _trace(traced, variant, folder, total, say)
    for number, name in enumerate(composed, len(traced) + 1):
        spec = _compose(name, variant, folder)
        say(f"[{number}/{total}] composed {name}")
        traced.append(spec)
        paths[name] = folder / f"{name}.onnx"
    graphs: dict[str, GraphInfo] = dict(shared)
    for number, spec in enumerate(traced, 1):
        try:
            error: float | None = _prove(paths[spec.name], spec, variant)
        except ExportError as mismatch:
            if not untrained or spec.draws == "none":
                raise
            error = None
            say(f"[{number}/{total}] checked {spec.name}: NOTE {mismatch}")
        else:
            say(f"[{number}/{total}] checked {spec.name}: largest error {error:.2g}")
        graphs[spec.name] = GraphInfo(
            name=spec.name,
            opset=variant.opset,
            inputs=spec.inputs,
            outputs=spec.outputs,
            phase=spec.phase,
            draws=spec.draws,
            small=spec.small,
            **written(paths[spec.name], f"graphs/{variant.precision}/", error),
        )
    return graphs


def _prove(path: Path, spec: GraphSpec, variant: _Variant) -> float:
    """Write a graph's form for CPUs, and prove all its forms -> the largest error. Raises ExportError."""
    reference = variant.reference(spec)
    errors = [validate_graph(form, spec, reference) for form in (path, write_cpu_form(path)) if form is not None]
    if spec.name in variant.cuda:
        errors.append(validate_graph(cuda_path(path), variant.cuda[spec.name], reference))
    return max(errors)


def _trace(specs: Sequence[GraphSpec], variant: _Variant, folder: Path, total: int, say: Progress) -> dict[str, Path]:
    """Write the traced graphs and their forms for CUDA, large weights in files that they share -> paths by name."""
    stores: dict[str, WeightStore] = {}
    paths = {}
    try:
        for number, spec in enumerate(specs, 1):
            say(f"[{number}/{total}] tracing {spec.name}")
            name = f"{spec.name}.data" if spec.convolutional else WEIGHTS_NAME
            if name not in stores:
                stores[name] = WeightStore(folder / name)
            path = paths[spec.name] = export_graph(spec, folder, stores[name], variant.opset)
            if spec.name in variant.cuda:
                form = replace(variant.cuda[spec.name], name=cuda_path(path).stem)
                finish_cuda_form(export_graph(form, folder, stores[name], variant.opset))
    finally:
        for store in stores.values():
            store.close()
    return paths


def _compose(name: str, variant: _Variant, folder: Path) -> GraphSpec:
    """Write a graph that is composed of those in the folder."""
    head = HEADS[variant.config.head]
    parts = {part: onnx.load(folder / f"{part}.onnx", load_external_data=False) for part in head.COMPOSED[name]}
    write_model(head.compose(name, parts, variant.config), folder / f"{name}.onnx")
    spec: GraphSpec = head.composed_spec(name, variant.config)
    return spec if variant.precision == "fp32" else head.in_float16(spec)


def written(path: Path, prefix: str, error: float | None) -> dict[str, Any]:
    """What `GraphInfo` says of a graph's file: where it and its weights lie (``prefix`` in the bundle), its error."""
    cpu, cuda = cpu_path(path), cuda_path(path)
    locations = set().union(*(external_locations(file) for file in (path, cpu, cuda) if file.exists()))
    return {
        "file": prefix + path.name,
        "cpu_file": prefix + cpu.name if cpu.exists() else None,
        "cuda_file": prefix + cuda.name if cuda.exists() else None,
        "weights": tuple(prefix + location for location in sorted(locations)),
        "max_abs_err": None if error is None else float(np.format_float_positional(error, 3, fractional=False)),
    }


def _quiet_exporter() -> None:
    """The exporter warns about optional packages that no graph of ours needs."""
    import logging

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


__all__ = ["ExportError", "check_match", "export_bundle", "graph_specs", "write_manifest"]
