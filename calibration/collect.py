"""Record what the layers of a bundle see while it generates: statistics per layer, samples of whole steps.

Runs the bundle's fp32 graphs in ONNX Runtime with extra outputs: the input of every layer, and the largest magnitude
of every other float tensor. Memory is bounded by one micro-batch; the statistics have a fixed size. A run that was
interrupted goes on after its last finished micro-batch and ends with the same result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from arinar.config import ArinarConfig
from arinar.export.layers import Graph, layer_graphs
from arinar.files import replacing
from arinar.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from arinar.runtime.backends.products import keep_products_exact
from arinar.runtime.bundle import Bundle, Defaults
from arinar.runtime.loop import Loop
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import check_labels, check_num_iter, check_number
from arinar.schedule import Step, steps

from .ranges import TensorStatistics

Array = npt.NDArray[Any]
FP16_MAX = 65504.0
#: Fewer images than this say too little about the tails of the activations.
MIN_IMAGES = 4
# Steps kept for comparing mixtures, and rows of a step at most.
STEP_SAMPLES, SAMPLE_ROWS = 16, 32
# A row of a causal model's step brings its whole KV cache along: of a kept step, so many bytes (or one row).
SAMPLE_BYTES = 64 << 20
# Of the file that keeps a recording.
RECORDING_VERSION = 3
# Tokens of a launch of random inputs.
RANDOM_TOKENS = 512
MAXIMA = "calibration.maxima"


class CalibrationError(ValueError):
    """Calibration that cannot go on, or a calibration file that does not fit. The message tells the remedy."""


@dataclass
class StepSample:
    """One outer step of a real trajectory: what went into the outer graph, and the features drawn from its z.

    ``feed`` inputs of ``graph`` (outer_prefill or outer_step); ``labels`` (N,) of the cache rows (causal only);
    ``rows`` which rows of the z that they give; ``features`` (rows, D - 1): all but the last, which conditions nothing.
    """

    graph: str
    step: int
    feed: dict[str, Array]
    labels: Array
    rows: Array
    features: Array


@dataclass
class Recording:
    """Everything recorded so far."""

    settings: dict[str, Any]
    layers: dict[str, TensorStatistics] = field(default_factory=dict)
    maxima: dict[str, Array] = field(default_factory=dict)  # graph -> (tensors, steps)
    tensors: dict[str, list[str]] = field(default_factory=dict)  # graph -> names of those tensors
    samples: list[StepSample] = field(default_factory=list)
    done: int = 0  # images
    seen_steps: int = 0

    def save(self, path: Path) -> None:
        """Write to ``path`` (npz) in one step."""
        arrays: dict[str, Array] = {}
        for name, statistics in self.layers.items():
            arrays |= {f"layer|{name}|{key}": value for key, value in statistics.arrays().items()}
        arrays |= {f"maxima|{graph}": value for graph, value in self.maxima.items()}
        for index, sample in enumerate(self.samples):
            arrays |= {f"sample|{index}|feed|{key}": value for key, value in sample.feed.items()}
            for key in ("labels", "rows", "features"):
                arrays[f"sample|{index}|{key}"] = getattr(sample, key)
        head = {
            "version": RECORDING_VERSION,
            "settings": self.settings,
            "done": self.done,
            "tensors": self.tensors,
            "seen_steps": self.seen_steps,
            "samples": [[sample.graph, sample.step] for sample in self.samples],
        }
        arrays["head"] = np.array(json.dumps(head))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises CalibrationError for what is not such a file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(str(arrays.pop("head")))
            if head["version"] != RECORDING_VERSION:
                raise ValueError(f"it has version {head['version']}; this version of arinar reads {RECORDING_VERSION}")
            made = cls(head["settings"], done=head["done"], seen_steps=head["seen_steps"])
            made.tensors = head["tensors"]
            grouped: dict[str, dict[str, Array]] = {}
            feeds: dict[int, dict[str, Array]] = {}
            parts: dict[int, dict[str, Array]] = {}
            for name, value in arrays.items():
                kind, *rest = name.split("|")
                if kind == "layer":
                    grouped.setdefault(rest[0], {})[rest[1]] = value
                elif kind == "maxima":
                    made.maxima[rest[0]] = value
                elif kind == "sample" and rest[1] == "feed":
                    feeds.setdefault(int(rest[0]), {})[rest[2]] = value
                elif kind == "sample":
                    parts.setdefault(int(rest[0]), {})[rest[1]] = value
            made.layers = {name: TensorStatistics.from_arrays(value) for name, value in grouped.items()}
            made.samples = [
                StepSample(graph, step, feeds.get(i, {}), **parts[i]) for i, (graph, step) in enumerate(head["samples"])
            ]
        except Exception as error:  # what NumPy, zipfile and zlib raise for damaged files has no common type
            raise CalibrationError(
                f"{path} is damaged, or no recording of `arinar calibrate` ({error}); delete it and calibrate again"
            ) from error
        return made


def model_hashes(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the fp32 graphs that hold layers and of their weights: what a calibration belongs to."""
    manifest = bundle.manifest
    graphs = manifest.precision_graphs("fp32")
    names = {name for g in layer_graphs(graphs) for name in (graphs[g].file, *graphs[g].weights)}
    return {name: manifest.files[name].sha256 for name in sorted(names)}


def with_outputs(graph: Graph) -> tuple[ModelProto, list[str]]:
    """A copy of a graph that also gives every layer's input and, as one vector, the largest magnitude of every float
    tensor that a node computes -> model, those tensors' names."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    known = onnx.shape_inference.infer_shapes(model, data_prop=False)
    floats = {
        value.name
        for value in (*known.graph.value_info, *known.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    floats -= _masked_scores(graph)
    tensors = [name for node in graph.model.graph.node for name in node.output if name in floats]
    extra = model.graph
    extra.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "calibration.flat"))
    extra.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "calibration.zero"))
    peaks = []
    for index, name in enumerate(tensors):
        prefix = f"calibration.{index}"
        for op, inputs, output, attributes in (
            ("Abs", [name], "abs", {}),
            ("Reshape", [f"{prefix}.abs", "calibration.flat"], "flat", {}),
            # The first step sees no token: a tensor may be empty, and has no maximum then.
            ("Concat", [f"{prefix}.flat", "calibration.zero"], "padded", {"axis": 0}),
            ("ReduceMax", [f"{prefix}.padded"], "max", {"keepdims": 1}),
        ):
            extra.node.append(helper.make_node(op, inputs, [f"{prefix}.{output}"], **attributes))
        peaks.append(f"{prefix}.max")
    extra.node.append(helper.make_node("Concat", peaks, [MAXIMA], axis=0))
    extra.output.append(helper.make_tensor_value_info(MAXIMA, TensorProto.FLOAT, None))
    present = {value.name for value in (*extra.input, *extra.output)}
    for name in dict.fromkeys(layer.input for layer in graph.layers.values()):
        if name not in present:
            extra.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model, tensors


def _masked_scores(graph: Graph) -> set[str]:
    """What attention adds its mask to: the mask's large negative number there says nothing about the activations."""
    producers = {name: node for node in graph.model.graph.node for name in node.output}
    open_names = [node.input[0] for node in graph.model.graph.node if node.op_type == "Softmax"]
    through = ("Add", "Concat", "Cast", "Where", "Gather", "Squeeze", "Slice")
    found: set[str] = set()
    while open_names:
        name = open_names.pop()
        node = producers.get(name)
        if name not in found and node is not None and node.op_type in through:
            found.add(name)
            open_names += node.input
    return found


def open_session(model: ModelProto, folder: Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session of a model in memory whose weights lie in files of ``folder``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    keep_products_exact(options)
    options.enable_cpu_mem_arena = False  # every step has other shapes: an arena would keep room for all of them
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class RecordingBackend(OnnxRuntimeCpu):
    """Runs the graphs that hold layers with extra outputs, and adds what they give to a recording."""

    def __init__(self, bundle: Bundle, recording: Recording, num_steps: int, seed: int, threads: int | None) -> None:
        super().__init__(bundle, "fp32", threads=threads)
        self.recording, self.num_steps, self.seed = recording, num_steps, seed
        self.step = 0
        self._instrumented: dict[str, tuple[Any, Graph]] = {}
        # Slot, the sample, and which rows of the launches it is made of.
        self._pending: tuple[int, StepSample, Array] | None = None
        for name in layer_graphs(bundle.manifest.config):
            graph = Graph.load(bundle.path(self._graphs[name].file))
            model, tensors = with_outputs(graph)
            self._instrumented[name] = (open_session(model, graph.folder, threads), graph)
            recording.tensors.setdefault(name, tensors)
            recording.maxima.setdefault(name, np.zeros((len(tensors), num_steps)))
            for layer in graph.layers.values():
                recording.layers.setdefault(layer.name, TensorStatistics(len(layer.weight), num_steps))

    def parts(self, graph: str, rows: int) -> int:
        return 1  # every launch is to be seen

    def launch(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if graph not in self._instrumented:
            super().launch(graph, inputs, outputs)
            return
        session, parsed = self._instrumented[graph]
        wanted = list(dict.fromkeys(layer.input for layer in parsed.layers.values() if layer.input not in inputs))
        values = session.run([*outputs, MAXIMA, *wanted], dict(inputs))
        made = dict(zip([*outputs, MAXIMA, *wanted], values, strict=True))
        # The first feature has none before it: what the graph is given then is left over from somewhere, and not read.
        unread = "feature" if graph == "inner_step" and inputs["position"][0] == 0 else None
        for layer in parsed.layers.values():
            if layer.input == unread:
                continue
            value = inputs[layer.input] if layer.input in inputs else made[layer.input]
            if not np.isfinite(value).all():
                raise FloatingPointError(
                    f"layer {layer.name!r} got values that are not finite at step {self.step}; "
                    f"the model itself is broken there, before any quantisation"
                )
            self.recording.layers[layer.name].update(value, self.step)
        maxima = self.recording.maxima[graph]
        if not np.isfinite(made[MAXIMA]).all():
            bad = self.recording.tensors[graph][int(np.nonzero(~np.isfinite(made[MAXIMA]))[0][0])]
            raise FloatingPointError(f"tensor {bad!r} of graph {graph!r} is not finite at step {self.step}")
        maxima[:, self.step] = np.maximum(maxima[:, self.step], made[MAXIMA])
        for name, target in outputs.items():
            target[...] = made[name]
        self._sample(graph, inputs, made)

    def _sample(self, graph: str, inputs: Mapping[str, Array], made: Mapping[str, Array]) -> None:
        """Reservoir sampling (algorithm R), its draws keyed by the count so that a resumed run goes on alike."""
        if graph in ("outer_prefill", "outer_step"):
            self._begin_step(graph, inputs, made["z"])
        elif graph == "inner_step" and self._pending is not None:
            self._add_feature(inputs)

    def _begin_step(self, graph: str, inputs: Mapping[str, Array], z: Array) -> None:
        seen = self.recording.seen_steps
        self.recording.seen_steps += 1
        slot = self._slot(seen)
        self._pending = None
        if graph == "outer_prefill":
            self._labels = np.array(inputs["labels"])
        if slot is None:
            return
        kept = self._rows(inputs, seen)
        rows = np.arange(len(z)) if kept is None else kept
        if len(rows) > SAMPLE_ROWS:
            rows = np.sort(self._rng("rows", seen).permutation(len(z))[:SAMPLE_ROWS])
        labels = self._labels if "rows" in inputs or graph == "outer_prefill" else np.zeros(0, np.int64)
        features = np.zeros((len(rows), 0), np.float32)
        sample = StepSample(graph, self.step, self._feed(inputs, kept), labels, rows, features)
        if kept is not None:
            sample.labels, sample.rows = labels[kept], np.arange(len(kept))
        self._pending = (slot, sample, rows)

    def _rows(self, inputs: Mapping[str, Array], seen: int) -> Array | None:
        """Which rows of a causal step to keep, where all with their caches are too large; else None."""
        caches = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        if "rows" not in inputs or not caches:
            return None
        total = len(inputs["rows"])
        most = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // sum(value[0].nbytes for value in caches)))
        return None if total <= most else np.sort(self._rng("rows", seen).permutation(total)[:most])

    def _feed(self, inputs: Mapping[str, Array], rows: Array | None) -> dict[str, Array]:
        """A copy of an outer graph's inputs, of a causal step's rows only ``rows``. What the graph is given but does not
        read is left over from somewhere, in a resumed run from elsewhere: zeros take its place."""
        caches = [name for name in inputs if name.startswith("past_key_values.")]
        by_row = [] if rows is None else ["rows", *caches]
        feed = {name: value[rows] if name in by_row else value.copy() for name, value in inputs.items()}
        for name in caches:
            feed[name][:, :, self._bundle.manifest.config.buffer_size + int(inputs["position"][0]) :] = 0
        return feed

    def _add_feature(self, inputs: Mapping[str, Array]) -> None:
        assert self._pending is not None
        slot, sample, rows = self._pending
        position = int(inputs["position"][0])
        if position > 0:
            sample.features = np.concatenate([sample.features, inputs["feature"][rows]], 1)
        if position == self._bundle.manifest.config.token_dim - 1:
            self.recording.samples[slot : slot + 1] = [sample]
            self._pending = None

    def _rng(self, purpose: str, count: int) -> np.random.Generator:
        key = hashlib.sha256(f"{self.seed} {purpose} {count}".encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))

    def _slot(self, seen: int) -> int | None:
        """Which of the kept steps the next one replaces, or is; None: it is not kept."""
        if seen < STEP_SAMPLES:
            return seen
        draw = int(self._rng("step", seen).integers(seen + 1))
        return draw if draw < STEP_SAMPLES else None


def check_arguments(
    config: ArinarConfig,
    defaults: Defaults,
    *,
    num_images: int,
    labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    cfg_schedule: str | None = None,
    temperature: float | None = None,
    num_iter: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> tuple[dict[str, Any], list[Step]]:
    """What :func:`collect` would do with these arguments -> its settings (but for the model), its steps.

    Raises CalibrationError for too few images, ValueError for the other arguments.
    """
    if num_images < MIN_IMAGES:
        raise CalibrationError(f"num_images is {num_images}; ranges need at least {MIN_IMAGES} images (64 and more are better)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    ids = check_labels(list(range(config.num_classes)) if labels is None else list(labels), config)
    scale = check_number("guidance_scale", defaults.guidance_scale if guidance_scale is None else guidance_scale, 1.0)
    heat = check_number("temperature", defaults.temperature if temperature is None else temperature, 0.0, strict=True)
    schedule = cfg_schedule or defaults.cfg_schedule
    plan = steps(config.seq_len, check_num_iter(num_iter, defaults.num_iter, config), scale, schedule)
    Noise.from_seed(seed, [], config)
    settings = {
        "num_images": num_images,
        "labels": [int(i) for i in ids],
        "seed": seed,
        "guidance_scale": scale,
        "cfg_schedule": schedule,
        "temperature": heat,
        "num_iter": len(plan),
        "batch_size": batch_size,
    }
    return settings, plan


def collect(
    bundle: Bundle,
    *,
    threads: int | None = None,
    partial: Path | None = None,
    progress: Callable[[str], None] | None = None,
    **arguments: Any,
) -> Recording:
    """Record ``num_images`` trajectories of a bundle's fp32 graphs.

    Parameters
    ----------
    arguments : as for :func:`check_arguments`; ``labels`` are taken in turn, None means all classes; ``batch_size``
        images at a time bounds the memory.
    partial : file that keeps the recording after every micro-batch. Where it exists and belongs to the same model and
        settings, the run goes on from it; it is left in place.

    Raises
    ------
    CalibrationError : too few images, or ``partial`` belongs to another run. ValueError : labels or sampling arguments.
    FloatingPointError : a layer's input is not finite; names the layer and the step.
    """
    say = progress or (lambda line: None)
    config = bundle.manifest.config
    settings, plan = check_arguments(config, bundle.manifest.defaults, **arguments)
    settings = {"model": model_hashes(bundle), **settings}
    ids, seed, num_images = settings["labels"], settings["seed"], settings["num_images"]
    guided, batch_size = settings["guidance_scale"] != 1.0, settings["batch_size"]
    recording = Recording(settings)
    if partial is not None and partial.exists():
        recording = Recording.load(partial)
        if recording.settings != settings:
            differing = [key for key in settings if recording.settings.get(key) != settings[key]]
            raise CalibrationError(
                f"{partial} is the interrupted run of another calibration ({', '.join(differing)} differ); delete it, "
                f"or repeat that run's settings"
            )
        say(f"resuming after {recording.done} of {num_images} images")
    backend = RecordingBackend(bundle, recording, len(plan), seed, threads)
    loop = Loop(backend, bundle.manifest.precision_graphs("fp32"), config, "stepwise")
    loop.keep_first_step = False  # every launch is to be seen
    while recording.done < num_images:
        first = recording.done
        indices = range(first, min(first + batch_size, num_images))
        noise = Noise.from_seed(seed, indices, config)
        batch = np.array([ids[i % len(ids)] for i in indices])
        _run(loop, backend, batch, noise, plan, guided, settings["temperature"])
        recording.done = indices.stop
        if partial is not None:
            recording.save(partial)
        say(f"{recording.done} of {num_images} images recorded")
    return recording


def _run(
    loop: Loop, backend: RecordingBackend, labels: Array, noise: Noise, plan: list[Step], guided: bool, heat: float
) -> None:
    """One micro-batch's tokens. (Images are not decoded: the VAE has no layers of interest.)"""
    state = loop.state(len(labels), 2 if guided else 1, plan)
    loop.fill(state, labels, noise, plan, heat)
    for step in plan:
        backend.step = step.index
        loop.draw(state, step, loop.outer(state, step))


def collect_random(bundle: Bundle, *, launches: int = 8, rows: int = 8, seed: int = 0) -> Recording:
    """Statistics over standard normal inputs, as one has them without calibrating: what calibration must beat."""
    config = bundle.manifest.config
    rows = max(1, min(rows, RANDOM_TOKENS // config.seq_len))  # every layer's input is held at once
    recording = Recording({"random": True})
    backend = RecordingBackend(bundle, recording, 1, seed, None)
    rng = np.random.default_rng(seed)
    length = config.seq_len
    limits = {"labels": (-1, config.num_classes), "rows": (0, 1)}
    for name in layer_graphs(config):
        info = bundle.manifest.graphs["fp32"][name]
        positions = length - 1 if name == "outer_step" and config.outer == "causal" else length
        positions = config.token_dim if name == "inner_step" else positions
        for _ in range(launches):
            middle = int(rng.integers(1, length - 1)) if length > 2 else 1
            sizes = {"V": length - middle - 1, "P": 1, "U": middle, "G": 2, "B": rows, "N": rows, "S": config.token_dim}
            feed: dict[str, Array] = {}
            for tensor in info.inputs:
                shape = tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)
                if tensor.dtype == "int64":
                    feed[tensor.name] = rng.integers(*limits.get(tensor.name, (0, positions)), shape)
                else:
                    feed[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
            session, parsed = backend._instrumented[name]
            wanted = [layer.input for layer in parsed.layers.values() if layer.input not in feed]
            values = dict(zip(wanted, session.run(wanted, feed), strict=True)) if wanted else {}
            for layer in parsed.layers.values():
                recording.layers[layer.name].update(values.get(layer.input, feed.get(layer.input)), 0)  # type: ignore[arg-type]
    return recording
