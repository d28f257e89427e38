"""Fewer bits: variants of a bundle's fp32 graphs whose layers compute in 8 bits. Needs no checkpoint.

- ``int8``: ranges taken as the graph runs (DynamicQuantizeLinear, MatMulInteger), for CPUs; needs no calibration.
- ``int8-static``, ``fp8``: explicit QuantizeLinear/DequantizeLinear, symmetric, zero point 0, weights per output
  channel; ranges from a calibration file. ONNX Runtime runs them, TensorRT builds them.

`inner_token` is composed again from the quantised parts, so it cannot drift from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from arinar.model import Arinar
from arinar.reading import read_json
from arinar.runtime.backends.products import keep_products_exact
from arinar.runtime.bundle import Bundle, BundleError, GraphInfo, Manifest, file_info
from arinar.schemes import QUANTIZED, SCHEMES
from arinar.text import printable, shown
from arinar.vae import AutoencoderKL
from arinar.values import entry, items, mapping, number, text

from .bundle import WEIGHTS_NAME, weights_sha256, written
from .cpu import cpu_path, write_cpu_form
from .folder import check_bundle_folder, locked, place, scratch_folder
from .graphs import HEADS
from .layers import Graph, Layer, LayerPlan, layer_graphs, smooth_scale
from .spec import Array, ExportError
from .trace import WeightStore, pool_weights, write_model

Progress = Callable[[str], None]
CALIBRATION_KIND, CALIBRATION_VERSION = "arinar calibration", 1


@dataclass(frozen=True)
class Calibration:
    """A calibration file: the model it belongs to (SHA-256 by file), ranges by layer, a precision map by precision."""

    path: Path
    model: dict[str, str]
    layers: dict[str, Any]
    maps: dict[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """Raises ExportError for what is not a calibration file of this version."""
        path = Path(path)
        try:
            data = mapping("it", read_json(path))
            if data.get("kind") != CALIBRATION_KIND:
                raise ValueError(f"its kind is {shown(data.get('kind'))}; expected {CALIBRATION_KIND!r}")
            version = entry("it", data, "format_version")
            model = mapping("settings.model", entry("settings", data.get("settings"), "model"))
            layers, maps = (mapping(name, entry("it", data, name)) for name in ("layers", "maps"))
            made = cls(
                path, {name: text(f"settings.model[{shown(name)}]", digest) for name, digest in model.items()}, layers, maps
            )
            if not made.model:
                raise ValueError("settings.model has no entries")
        except OSError as error:
            raise ExportError(f"{path} cannot be read ({error.strerror or error}); `arinar calibrate` writes one") from error
        except ValueError as error:
            raise ExportError(f"{path} is not a calibration file ({error}); `arinar calibrate` writes one") from error
        if isinstance(version, bool) or version != CALIBRATION_VERSION:
            raise ExportError(
                f"{path} has format version {shown(version)}; this version reads {CALIBRATION_VERSION}: calibrate again"
            )
        return made

    def check(self, bundle: Bundle) -> None:
        """Raise ExportError unless this calibration was made on the bundle's fp32 graphs."""
        for name, digest in self.model.items():
            info = bundle.manifest.files.get(name)
            if info is None or info.sha256 != digest:
                have = "no such file" if info is None else f"SHA-256 {info.sha256[:12]}..."
                raise ExportError(
                    f"{self.path} was calibrated on another model: it says {shown(name)} is {shown(digest[:12])}, the bundle "
                    f"has {have}. Calibrate this bundle: `arinar calibrate {bundle.folder} --out {self.path.name}`"
                )

    def _damaged(self, what: str, error: Exception) -> ExportError:
        return ExportError(f"{self.path}: {what} is damaged ({error}); calibrate again")

    def plan(self, layer: Layer, scheme: str, said: Any) -> LayerPlan:
        """Raises ExportError naming the layer where what the file says of it cannot be used."""
        try:
            smooth = None
            given = mapping("it", said)
            if "smooth_alpha" in given:
                seen = items("absmax_per_channel", entry(layer.name, self.layers.get(layer.name), "absmax_per_channel"))
                channels = np.array([number("absmax_per_channel", value, 0) for value in seen])
                if channels.shape != layer.weight.shape[:1]:
                    raise ValueError(f"absmax_per_channel has shape {channels.shape}; expected {layer.weight.shape[:1]}")
                alpha = number("smooth_alpha", given["smooth_alpha"], 0)
                if alpha > 1:
                    raise ValueError(f"smooth_alpha is {alpha}; expected 0 to 1")
                smooth = smooth_scale(channels, layer.weight, alpha)
            absmax = given.get("absmax")
            return LayerPlan(scheme, None if absmax is None else number("absmax", absmax, 0), smooth)
        except ValueError as error:
            raise self._damaged(f"the entry of layer {layer.name}", error) from error

    def plans(self, scheme: str, layers: Mapping[str, Layer]) -> dict[str, LayerPlan]:
        """The precision map that the budget search chose. Raises ExportError where it made none for this precision."""
        if scheme not in self.maps:
            raise ExportError(
                f"{self.path} has no map for {scheme}; it has {', '.join(self.maps) or 'none'}. "
                f"`arinar calibrate --precision {scheme}` makes one"
            )
        try:
            chosen = mapping("quantized", entry("it", self.maps[scheme], "quantized"))
        except ValueError as error:
            raise self._damaged(f"the map for {scheme}", error) from error
        unknown = sorted(set(chosen) - set(layers))
        if unknown:
            listed = printable(", ".join(unknown), 200)
            raise ExportError(f"{self.path} names layers that the bundle does not have: {listed}; calibrate again")
        return {name: self.plan(layers[name], scheme, said) for name, said in chosen.items()}


def default_plans(
    precision: str, layers: Mapping[str, Layer], ranges: Mapping[str, float] | None = None
) -> dict[str, LayerPlan]:
    """Every layer that is wide enough, with given ranges (largest magnitude by layer) where the precision needs them."""
    wide = {name: layer for name, layer in layers.items() if layer.wide}
    if SCHEMES[precision].ranges == "dynamic":
        return {name: LayerPlan(precision) for name in wide}
    if ranges is None:
        raise ExportError(
            f"precision {precision} needs ranges: `arinar calibrate BUNDLE --out calib.json`, then --calibration calib.json"
        )
    return {name: LayerPlan(precision, ranges[name]) for name in wide}


def quantize_bundle(
    bundle: str | os.PathLike[str],
    precision: str,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    *,
    plans: Mapping[str, LayerPlan] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Add a quantised variant to a bundle that holds fp32 graphs.

    Parameters
    ----------
    bundle : folder of the bundle; changed only when every new graph has passed.
    precision : "int8", "int8-static" or "fp8".
    calibration : file of `arinar calibrate`, whose precision map is used. Needed except for int8, which without one
        quantises every layer that is wide enough.
    plans : how to quantise which layer, instead of what ``calibration`` says.
    name : of the variant in the bundle; default the precision.
    overwrite : replace an existing variant.

    Raises
    ------
    ValueError, BundleError : bad arguments, or a bundle without fp32 graphs. ExportError : the calibration is missing,
    damaged or another model's, or a quantised graph does not run.
    """
    if precision not in QUANTIZED:
        raise ValueError(f"precision is {precision!r}; quantised precisions are {', '.join(QUANTIZED)}")
    say, variant = progress or (lambda line: None), name or precision
    if variant != precision and (variant in SCHEMES or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", variant)):
        raise ValueError(
            f"name is {variant!r}; expected letters, digits, '.', '_' and '-', and not another scheme's name "
            f"({', '.join(SCHEMES)})"
        )
    opened = Bundle.open(bundle)
    folder = opened.folder
    infos = opened.manifest.precision_graphs("fp32")
    _check_free(opened, variant, overwrite)
    check_bundle_folder(folder)
    opened.verify(sorted({file for info in infos.values() for file in info.files}))
    graphs = {n: Graph.load(opened.graph_path(infos[n])) for n in layer_graphs(infos)}
    layers = {key: layer for graph in graphs.values() for key, layer in graph.layers.items()}
    used: Calibration | None = None
    if plans is None:
        if calibration is not None:
            used = calibration if isinstance(calibration, Calibration) else Calibration.read(calibration)
            used.check(opened)
            plans = used.plans(precision, layers)
        else:
            plans = default_plans(precision, layers)
    say(f"{variant}: {len(plans)} of {len(layers)} layers in {SCHEMES[precision].title}")

    with scratch_folder(folder) as scratch:
        target = scratch / "graphs" / variant
        target.mkdir(parents=True)
        made = _write(opened, graphs, plans, target, say)
        files = {path.relative_to(scratch).as_posix(): file_info(path) for path in sorted(target.iterdir())}
        prefix = f"graphs/{variant}/"
        # What has no layers is shared with fp32; first steps are computed by the quantised step itself.
        entries = {name: info for name, info in infos.items() if info.phase != "first"}
        for key, error in _validate(opened, made, target).items():
            say(f"checked {key}: largest difference from fp32 {error:.2g}")
            entries[key] = replace(infos[key], **written(made[key], prefix, error))
        origin: dict[str, Any] = {"layers": len(plans)}
        if used is not None:
            origin["calibration_sha256"] = file_info(used.path).sha256
        with locked(folder, say):
            # Meanwhile another command may have changed the bundle: its manifest is the one to add to.
            current = Bundle.open(folder)
            _check_free(current, variant, overwrite)
            if current.manifest.graphs.get("fp32") != infos:
                raise BundleError(f"another command has replaced the fp32 graphs of {folder} meanwhile; run this one again")
            added = replace(
                current.manifest,
                graphs={variant: entries},
                files=files,
                schemes={variant: precision},
                provenance={"quantization": {variant: origin}},
            )
            merged = place(target, folder, added, add=True)
    say(f"{folder}: {variant}, {sum(info.size for info in files.values()) / 1e6:.1f} MB beside fp32")
    return merged


def _check_free(bundle: Bundle, variant: str, overwrite: bool) -> None:
    if variant in bundle.manifest.graphs and not overwrite:
        raise BundleError(f"{bundle.folder} already holds {variant} graphs; pass --overwrite to replace them")


def check_weights(bundle: Bundle, model: Arinar, vae: AutoencoderKL) -> None:
    """Raise BundleError where a bundle's fp32 graphs are not those of a model and its VAE."""
    origin = bundle.manifest.provenance
    for key, module in (("weights_sha256", model), ("vae_weights_sha256", vae)):
        if key in origin and origin[key] != weights_sha256(module):
            raise BundleError(f"{bundle.folder} is a bundle of another model ({key} differs); choose another output folder")


def _write(
    bundle: Bundle, graphs: Mapping[str, Graph], plans: Mapping[str, LayerPlan], target: Path, say: Progress
) -> dict[str, Path]:
    """Quantised graphs, and `inner_token` composed of them -> their paths."""
    config, infos = bundle.manifest.config, bundle.manifest.graphs["fp32"]
    store = WeightStore(target / WEIGHTS_NAME)
    models: dict[str, onnx.ModelProto] = {}
    paths = {}
    try:
        for name, graph in graphs.items():
            model = graph.quantized({layer: plan for layer, plan in plans.items() if layer in graph.layers})
            pool_weights(model, graph.folder, store)
            models[name] = model
        head, parts = HEADS[config.head], dict(models)
        for name, names in head.COMPOSED.items():
            for part in names:
                if part not in parts:  # it has no layers, and is not written again
                    same = Graph.load(bundle.graph_path(infos[part]))
                    pool_weights(same.model, same.folder, store)
                    parts[part] = same.model
            models[name] = head.compose(name, parts, config)
    finally:
        store.close()
    for name, model in models.items():
        paths[name] = target / f"{name}.onnx"
        write_model(model, paths[name])
        write_cpu_form(paths[name])
    return paths


def _validate(bundle: Bundle, paths: Mapping[str, Path], folder: Path) -> dict[str, float]:
    """Check each graph and run it in ONNX Runtime beside its fp32 form -> largest difference of its first output.

    Raises ExportError for a graph that does not load, run, or give finite values.
    """
    errors = {}
    for name, path in paths.items():
        info = bundle.manifest.graphs["fp32"][name]
        try:
            forms = [form for form in (path, cpu_path(path)) if form.exists()]
            for form in forms:
                onnx.checker.check_model(str(form), full_check=True)
            feed = example_feed(bundle, info)
            have, want = _run(forms[-1], info, feed), _run(bundle.graph_path(info), info, feed)
        except ExportError:
            raise
        except Exception as error:  # the checker and ONNX Runtime have exception types of their own
            raise ExportError(f"the quantised graph {name!r} does not run: {error}") from error
        for tensor, value in zip(info.outputs, have, strict=True):
            if not np.isfinite(value).all():
                raise ExportError(f"the quantised graph {name!r} makes values that are not finite in {tensor.name!r}")
        errors[name] = float(np.abs(have[0].astype(np.float64) - want[0]).max())
    return errors


def _run(path: Path, info: GraphInfo, feed: Mapping[str, Array]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    keep_products_exact(options)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run([tensor.name for tensor in info.outputs], dict(feed)))


def example_feed(bundle: Bundle, info: GraphInfo, rows: int = 3, seed: int = 0) -> dict[str, Array]:
    """Random inputs of a graph: ids and positions in range, uniforms in [0, 1), the rest standard normal."""
    config = bundle.manifest.config
    rng = np.random.default_rng(seed)
    middle = config.seq_len // 2
    sizes = {
        "V": config.seq_len - middle - 1,
        "P": 1,
        "U": middle,
        "G": 2,
        "B": rows,
        "S": config.token_dim,
        "M": rows,
        # Where drawn rows stand beside them, N is theirs of both branches.
        "N": 2 * rows if any("M" in tensor.shape for tensor in info.inputs) else rows,
    }
    positions = config.token_dim if info.phase == "head" else config.seq_len - 1
    upper = {"labels": config.num_classes, "mixed_labels": config.num_classes, "rows": 1, "position": positions}
    feed: dict[str, Array] = {}
    for tensor in info.inputs:
        shape = tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)
        if np.dtype(tensor.dtype).kind in "iu":
            low = -1 if tensor.name == "labels" else 0
            feed[tensor.name] = rng.integers(low, upper.get(tensor.name, config.seq_len), shape).astype(tensor.dtype)
        elif tensor.name == "uniforms":
            feed[tensor.name] = rng.random(shape).astype(tensor.dtype)
        elif tensor.name in ("guidance_scale", "temperature"):
            feed[tensor.name] = np.ones(shape, tensor.dtype)
        else:
            feed[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    return feed


def variant_bytes(bundle: Bundle, precision: str, names: Iterable[str] | None = None) -> int:
    """Bytes of weights that a variant's graphs refer to or hold (the VAE left out), each stored tensor once."""
    infos = bundle.manifest.precision_graphs(precision)
    seen: dict[tuple[str, int], int] = {}
    inline = 0
    for name, info in infos.items():
        if info.convolutional or info.draws == "chain" or (names is not None and name not in names):
            continue
        model = onnx.load(bundle.graph_path(info), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                place = (f"{Path(info.file).parent}/{entries['location']}", int(entries.get("offset", 0)))
                seen[place] = int(entries["length"])
            else:
                inline += tensor.ByteSize()
    return inline + sum(seen.values())


__all__ = ["Calibration", "check_weights", "default_plans", "quantize_bundle", "variant_bytes"]
