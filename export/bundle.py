"""A trained model and its VAE -> a bundle that runs without PyTorch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

import arinar
from arinar.config import ArinarConfig
from arinar.files import write_text
from arinar.mixture_law import NUM_CANDIDATES, NUM_UNIFORMS
from arinar.model import Arinar, CausalArinar
from arinar.outer import MaskedOuter
from arinar.runtime.bundle import (
    MANIFEST_NAME,
    PRECISIONS,
    Bundle,
    BundleError,
    Defaults,
    GraphInfo,
    Manifest,
    TensorInfo,
    file_info,
)
from arinar.vae import AutoencoderKL

from .compose import compose_inner_token, inner_token_info
from .cpu import cpu_path, write_cpu_form
from .steps import (
    CausalPrefill,
    CausalStep,
    CausalStepInPlace,
    InnerCondition,
    InnerStep,
    MaskedStep,
    MixtureSample,
    PlainMixtureSample,
    TokensToLatents,
    VaeDecoder,
    VaeEncoder,
    cache_slots,
    half_precision,
    half_precision_vae,
)
from .trace import (
    DEFAULT_OPSET,
    OPSETS,
    Array,
    ExportError,
    GraphSpec,
    WeightStore,
    exact_reference,
    export_graph,
    validate_graph,
    write_model,
)

Progress = Callable[[str], None]

# Largest error of a float16 graph against the float32 module, relative to outputs above 1. Measured on random inputs:
# 2e-3 (demo models), 4e-3 (the published size, random weights); 1.2e-2 for three in four of a token's features (the
# rest may follow another draw).
FP16_ATOL, FP16_VAE_ATOL = 2e-2, 2e-2
FP16_DRAW_ATOL, FP16_DRAW_SHARE = 0.1, 0.75

# From here on ONNX has an operator that writes a row into a cache (TensorScatter).
IN_PLACE_OPSET = 24

# The file beside the graphs of a precision that holds their large weights. Those of the autoencoder's graphs lie apart,
# so that a variant that shares them need not read the rest.
WEIGHTS_NAME = "weights.data"

# Graphs of the autoencoder. A precision whose VAE stays float32 shares those of fp32, where the bundle has them.
VAE_GRAPHS = ("vae_decoder", "vae_encoder")

# Entries of the provenance that tell one model from another.
WEIGHT_HASHES = ("weights_sha256", "vae_weights_sha256")


@dataclass(frozen=True)
class _Parts:
    """Step modules of one model."""

    outer: dict[str, GraphSpec]
    condition: GraphSpec
    step: GraphSpec
    plain: GraphSpec
    guided: GraphSpec
    vae: dict[str, GraphSpec]


def _info(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


def cache_info(
    kind: str, depth: int, rows: str, heads: int, slots: int | str, head_dim: int, dtype: str
) -> tuple[TensorInfo, ...]:
    """`past_key_values.N.key` or `present.N.key` and the values, per layer, each (rows, H, slots, head_dim)."""
    return tuple(
        _info(f"{kind}.{layer}.{part}", (rows, heads, slots, head_dim), dtype)
        for layer in range(depth)
        for part in ("key", "value")
    )


def _masked_outer(outer: MaskedOuter) -> dict[str, GraphSpec]:
    config = outer.config
    length = config.seq_len
    middle = length // 2
    return {
        "outer_step": GraphSpec(
            "outer_step",
            MaskedStep(outer),
            (
                _info("visible_tokens", ("V", "B", config.token_dim)),
                _info("visible_positions", ("V", "B"), "int64"),
                _info("target_positions", ("P", "B"), "int64"),
                _info("hidden_positions", ("U", "B"), "int64"),
                _info("labels", ("G", "B"), "int64"),
            ),
            (_info("z", ("G*P*B", config.z_width)),),
            {name: (0, length) for name in ("visible_positions", "target_positions", "hidden_positions")}
            | {"labels": (-1, config.num_classes)},
            # The first step (nothing visible), the last (nothing hidden), one in the middle.
            (
                {"V": 0, "B": 1, "P": 1, "U": length - 1, "G": 1},
                {"V": length - 2, "B": 1, "P": 2, "U": 0, "G": 2},
                {"V": middle, "B": 3, "P": 1, "U": length - middle - 1, "G": 2},
            ),
        )
    }


def _causal_outer(outer: CausalArinar, dtype: str, in_place: bool) -> dict[str, GraphSpec]:
    config = outer.config
    depth, heads = config.decoder_depth, config.decoder_heads
    head_dim, slots = config.decoder_width // heads, cache_slots(config)
    z = _info("z", ("N", config.z_width))
    sizes: tuple[dict[str, int], ...] = ({"N": 1, "B": 1}, {"N": 2, "B": 1}, {"N": 6, "B": 3})
    return {
        "outer_prefill": GraphSpec(
            "outer_prefill",
            CausalPrefill(outer),
            (_info("labels", ("N",), "int64"),),
            (z, *cache_info("present", depth, "N", heads, config.buffer_size, head_dim, dtype)),
            {"labels": (-1, config.num_classes)},
            ({"N": 1}, {"N": 2}, {"N": 6}),
        ),
        "outer_step": GraphSpec(
            "outer_step",
            CausalStepInPlace(outer) if in_place else CausalStep(outer),
            (
                _info("token", ("B", config.token_dim)),
                _info("rows", ("N",), "int64"),
                _info("position", (1,), "int64"),
                *cache_info("past_key_values", depth, "N", heads, slots, head_dim, dtype),
            ),
            (z, *cache_info("present", depth, "N", heads, slots if in_place else 1, head_dim, dtype)),
            {"rows": (0, 1), "position": (0, config.seq_len - 1)},
            sizes,
        ),
    }


def _parts(model: Arinar, vae: AutoencoderKL, num_candidates: int, opset: int) -> _Parts:
    config = model.config
    inner = model.arhead
    dtype = str(next(inner.parameters()).dtype).removeprefix("torch.")
    z, width, features = config.z_width, config.inner_width, config.token_dim
    gaussians, depth = config.num_gaussians, config.inner_depth
    heads, head_dim = config.inner_heads, config.inner_head_dim
    rows: tuple[dict[str, int], ...] = ({"N": 1}, {"N": 2}, {"N": 7})
    draws: tuple[dict[str, int], ...] = ({"M": 1}, {"M": 3}, {"M": 64})
    start = _info("start", ("N", width), dtype)
    modulation = _info("modulation", ("N", 6 * depth + 2, width), dtype)
    mixture = tuple(_info(name, ("N", gaussians)) for name in ("weight", "mu", "logvar"))
    drawn = tuple(_info(name, ("M", gaussians)) for name in ("weight", "mu", "logvar"))
    uncond = tuple(_info(f"{name}_uncond", ("M", gaussians)) for name in ("weight", "mu", "logvar"))
    uniforms, temperature = _info("uniforms", ("M", NUM_UNIFORMS)), _info("temperature", (1,))
    scale, feature = _info("guidance_scale", (1,)), (_info("feature", ("M", 1)),)
    side = config.grid_size * config.patch_size
    latents = _info("latents", ("B", config.vae_embed_dim, side, side))
    images = _info("images", ("B", config.img_size, config.img_size, 3), "uint8")
    batches: tuple[dict[str, int], ...] = ({"B": 1}, {"B": 3}) if config.img_size < 128 else ({"B": 1},)
    return _Parts(
        outer=_causal_outer(model, dtype, opset >= IN_PLACE_OPSET)
        if isinstance(model, CausalArinar)
        else _masked_outer(_as_masked(model)),
        condition=GraphSpec("inner_condition", InnerCondition(inner), (_info("z", ("N", z)),), (start, modulation), {}, rows),
        step=GraphSpec(
            "inner_step",
            InnerStep(inner),
            (
                _info("feature", ("N", 1)),
                _info("position", (1,), "int64"),
                start,
                modulation,
                *cache_info("past_key_values", depth, "N", heads, "S", head_dim, dtype),
            ),
            (*mixture, *cache_info("present", depth, "N", heads, 1, head_dim, dtype)),
            {"position": (0, features)},
            tuple({"N": n, "S": s} for n, s in ((1, features), (2, 1), (7, features - 1))),
        ),
        plain=GraphSpec(
            "mixture_sample",
            PlainMixtureSample(gaussians, num_candidates),
            (*drawn, uniforms, temperature),
            feature,
            {},
            draws,
        ),
        guided=GraphSpec(
            "mixture_sample_guided",
            MixtureSample(gaussians, num_candidates),
            (*drawn, *uncond, uniforms, scale, temperature),
            feature,
            {},
            draws,
            atol=1e-3,
        ),
        vae={
            "tokens_to_latents": GraphSpec(
                "tokens_to_latents",
                TokensToLatents(config),
                (_info("tokens", (config.seq_len, "B", features)), _info("ranks", ("B", config.seq_len), "int64")),
                (_info("raster", ("B", config.seq_len, features)), latents),
                {"ranks": (0, config.seq_len)},
                batches,
            ),
            "vae_decoder": GraphSpec("vae_decoder", VaeDecoder(vae), (latents,), (images,), {}, batches),
            "vae_encoder": GraphSpec("vae_encoder", VaeEncoder(vae), (images,), (latents,), {"images": (0, 256)}, batches),
        },
    )


def graph_specs(
    model: Arinar, vae: AutoencoderKL, num_candidates: int = NUM_CANDIDATES, opset: int = DEFAULT_OPSET
) -> dict[str, GraphSpec]:
    """The graphs that are traced for a model, by name: step module, inputs, outputs and test sizes of each."""
    parts = _parts(model, vae, num_candidates, opset)
    singles = (parts.condition, parts.step, parts.plain, parts.guided)
    return parts.outer | {spec.name: spec for spec in singles} | parts.vae


def _as_masked(model: Arinar) -> MaskedOuter:
    assert isinstance(model, MaskedOuter)
    return model


def _inner_token_reference(parts: _Parts, config: ArinarConfig, guided: bool) -> Callable[[dict[str, Array]], Sequence[Array]]:
    """What `inner_token` must compute, by its step modules one feature after another in PyTorch."""

    @torch.no_grad()
    def run(feed: dict[str, Array]) -> list[Array]:
        tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
        start, modulation = parts.condition.module(tensors["z"])
        rows, heads, size = len(start), config.inner_heads, config.inner_head_dim
        cache = [torch.zeros(rows, heads, config.token_dim, size, dtype=start.dtype) for _ in range(2 * config.inner_depth)]
        feature = torch.zeros(rows, 1)
        drawn: list[Tensor] = []
        for position in range(config.token_dim):
            weight, mu, logvar, *new = parts.step.module(feature, torch.tensor([position]), start, modulation, *cache)
            for past, row in zip(cache, new, strict=True):
                past[:, :, position : position + 1] = row
            uniforms = tensors["uniforms"][:, position]
            if guided:
                cond, uncond = zip(*(t.chunk(2) for t in (weight, mu, logvar)), strict=True)
                value = parts.guided.module(*cond, *uncond, uniforms, tensors["guidance_scale"], tensors["temperature"])
                feature = torch.cat([value, value])
            else:
                value = feature = parts.plain.module(weight, mu, logvar, uniforms, tensors["temperature"])
            drawn.append(value)
        return [torch.cat(drawn, 1).numpy()]

    return run


def export_bundle(
    model: Arinar,
    vae: AutoencoderKL,
    out: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    vae_precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    num_candidates: int = NUM_CANDIDATES,
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
    num_candidates : N of the guided draw, part of the model's published sampling law.
    overwrite : replace an existing bundle, or an existing precision of it.
    provenance : recorded in the manifest (where the weights came from).
    progress : called with a line per stage.

    Raises
    ------
    ValueError, BundleError : bad arguments, or ``out`` cannot be written to.
    ExportError : a graph does not compute what its module computes. Nothing is left behind.
    """
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"precision is {precision!r}; this exporter traces fp32 and fp16 (others: {PRECISIONS[2:]})")
    if vae_precision not in ("fp32", "fp16"):
        raise ValueError(f"vae_precision is {vae_precision!r}; choose one of fp32, fp16")
    if vae_precision != "fp32" and precision == "fp32":
        raise ValueError("vae_precision fp16 belongs to an fp16 variant; its transformer graphs would be fp32")
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; choose one of {', '.join(map(str, OPSETS))}")
    check_match(model.config, vae)
    say = progress or (lambda line: None)
    out = Path(out)
    hashes = {"weights_sha256": weights_sha256(model), "vae_weights_sha256": weights_sha256(vae)}
    provenance = dict(provenance or {}) | hashes
    existing = _existing(out, model.config, precision, num_candidates, overwrite, provenance)
    shared: dict[str, GraphInfo] = {}
    if existing is not None and precision != "fp32" and vae_precision == "fp32":
        shared = _shared_graphs(existing.manifest, opset)

    _quiet_exporter()
    with _scratch(out) as scratch:
        folder = scratch / "graphs" / precision
        folder.mkdir(parents=True)
        graphs = _write_graphs(model, vae, folder, precision, vae_precision, opset, num_candidates, shared, say)
        files = {path.relative_to(scratch).as_posix(): file_info(path) for path in sorted(folder.iterdir())}
        manifest = Manifest(
            config=model.config,
            graphs={precision: graphs},
            files=files,
            defaults=Defaults(model.config.default_num_iter, model.config.default_guidance_scale),
            num_candidates=num_candidates,
            provenance={"arinar": arinar.__version__, "torch": torch.__version__, "onnx": onnx.__version__}
            | {"vae_config": vae.config.to_dict()}
            | provenance,
        )
        if existing is None:
            (scratch / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            _replace_folder(scratch, out)
        else:
            manifest = _merge(existing.manifest, manifest)
            _replace_folder(folder, out / "graphs" / precision)
            write_manifest(out, manifest)
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
    num_candidates: int,
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
        and bundle.manifest.num_candidates == num_candidates
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
    return {name: graphs[name] for name in VAE_GRAPHS if name in graphs and graphs[name].opset == opset}


def _merge(old: Manifest, new: Manifest) -> Manifest:
    (precision,) = new.graphs
    prefix = f"graphs/{precision}/"
    kept = {name: info for name, info in old.files.items() if not name.startswith(prefix)}
    graphs = {p: dict(g) for p, g in old.graphs.items() if p != precision} | new.graphs
    # Other precisions that share a graph of the one that was replaced go on sharing it.
    for others in graphs.values():
        for name, info in others.items():
            if info.file.startswith(prefix):
                others[name] = new.graphs[precision][name]
    return replace(new, graphs=graphs, files=kept | new.files, provenance=old.provenance | new.provenance)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle in one step."""
    write_text(folder / MANIFEST_NAME, manifest.to_json())


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` (same file system, so that it can be renamed), removed whatever happens."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror or error}; choose another folder") from error
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what stood there is moved aside first and removed after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, aside / "old")
        os.rename(source, target)
        shutil.rmtree(aside)
    else:
        os.rename(source, target)


def _write_graphs(
    model: Arinar,
    vae: AutoencoderKL,
    folder: Path,
    precision: str,
    vae_precision: str,
    opset: int,
    num_candidates: int,
    shared: Mapping[str, GraphInfo],
    say: Progress,
) -> dict[str, GraphInfo]:
    config = model.config
    exact = parts = _parts(model, vae, num_candidates, opset)
    if precision == "fp16":
        small_vae = half_precision_vae(vae) if vae_precision == "fp16" else vae
        parts = _tolerant(_parts(half_precision(model), small_vae, num_candidates, opset), vae_precision == "fp16")
    traced = [spec for spec in _traced(parts) if spec.name not in shared]
    stores: dict[str, WeightStore] = {}
    graphs: dict[str, GraphInfo] = dict(shared)
    total = len(traced) + 2
    references: dict[str, Callable[[dict[str, Array]], Sequence[Array]]] = {}
    if precision != "fp32":
        by_name = {spec.name: spec for spec in _traced(exact)}
        references = {spec.name: exact_reference(spec, by_name[spec.name]) for spec in traced}
    try:
        paths = {}
        for number, spec in enumerate(traced, 1):
            say(f"[{number}/{total}] tracing {spec.name}")
            name = f"{spec.name}.data" if spec.name in VAE_GRAPHS else WEIGHTS_NAME
            if name not in stores:
                stores[name] = WeightStore(folder / name)
            paths[spec.name] = export_graph(spec, folder, stores[name], opset)
        for number, guided in enumerate((False, True), len(traced) + 1):
            spec, path = _compose(parts, config, folder, guided)
            if precision != "fp32":
                spec = replace(spec, atol=FP16_DRAW_ATOL, share=FP16_DRAW_SHARE)
            say(f"[{number}/{total}] composed {spec.name}")
            traced.append(spec)
            paths[spec.name] = path
            references[spec.name] = _inner_token_reference(exact, config, guided)
    finally:
        for store in stores.values():
            store.close()
    for number, spec in enumerate(traced, 1):
        error = validate_graph(paths[spec.name], spec, references.get(spec.name))
        if (cpu := write_cpu_form(paths[spec.name])) is not None:
            error = max(error, validate_graph(cpu, spec, references.get(spec.name)))
        say(f"[{number}/{total}] checked {spec.name}: largest error {error:.2g}")
        graphs[spec.name] = GraphInfo(
            name=spec.name,
            opset=opset,
            inputs=spec.inputs,
            outputs=spec.outputs,
            **written(paths[spec.name], f"graphs/{precision}/", error),
        )
    return graphs


def written(path: Path, prefix: str, error: float) -> dict[str, Any]:
    """What `GraphInfo` says of a graph's file: where it and its weights lie (``prefix`` in the bundle), its error."""
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    external = [tensor for tensor in initializers if tensor.data_location == onnx.TensorProto.EXTERNAL]
    locations = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    cpu = cpu_path(path)
    return {
        "file": prefix + path.name,
        "cpu_file": prefix + cpu.name if cpu.exists() else None,
        "weights": tuple(prefix + location for location in sorted(locations)),
        "max_abs_err": float(np.format_float_positional(error, 3, fractional=False)),
    }


def _traced(parts: _Parts) -> list[GraphSpec]:
    return [*parts.outer.values(), parts.condition, parts.step, parts.plain, parts.guided, *parts.vae.values()]


def _tolerant(parts: _Parts, vae: bool) -> _Parts:
    """The tolerances of float16 for those graphs that compute in it."""
    return replace(
        parts,
        outer={name: replace(spec, atol=FP16_ATOL) for name, spec in parts.outer.items()},
        condition=replace(parts.condition, atol=FP16_ATOL),
        step=replace(parts.step, atol=FP16_ATOL),
        vae={n: replace(s, atol=FP16_VAE_ATOL) if vae and n in VAE_GRAPHS else s for n, s in parts.vae.items()},
    )


def _compose(parts: _Parts, config: ArinarConfig, folder: Path, guided: bool) -> tuple[GraphSpec, Path]:
    def read(name: str) -> onnx.ModelProto:
        return onnx.load(folder / f"{name}.onnx", load_external_data=False)

    mixture = parts.guided if guided else parts.plain
    composed = compose_inner_token(
        read("inner_condition"), read("inner_step"), read(mixture.name), config, guided=guided, num_uniforms=NUM_UNIFORMS
    )
    inputs, outputs = inner_token_info(config, guided, NUM_UNIFORMS)
    copies = 2 if guided else 1
    spec = GraphSpec(
        composed.graph.name,
        torch.nn.Identity(),
        tuple(inputs),
        tuple(outputs),
        {},
        tuple({"M": m, "N": copies * m} for m in (1, 3, 16)),
        atol=5e-3 if guided else 1e-3,
    )
    path = folder / f"{spec.name}.onnx"
    write_model(composed, path)
    return spec, path


def _quiet_exporter() -> None:
    """The exporter warns about optional packages that no graph of ours needs."""
    import logging

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


__all__ = ["ExportError", "check_match", "export_bundle", "graph_specs", "write_manifest"]
