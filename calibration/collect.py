"""Record what the layers of a bundle see while it generates: statistics per layer, samples of whole steps.

Runs the bundle's fp32 graphs in ONNX Runtime with extra outputs: the input of every layer, and the largest magnitude
of every other float tensor. Memory is bounded by one micro-batch; the statistics have a fixed size. A run that was
interrupted goes on after its last finished micro-batch and ends with the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from arinar.config import ArinarConfig
from arinar.diffusion_schedule import TRAIN_STEPS
from arinar.export.layers import Graph, layer_graphs
from arinar.runtime.backends.cpu import Buffers
from arinar.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from arinar.runtime.backends.products import keep_products_exact
from arinar.runtime.bundle import Bundle, Defaults, GraphInfo
from arinar.runtime.head import head_class
from arinar.runtime.loop import Loop
from arinar.runtime.request import Sampling

from .ranges import TensorStatistics
from .recording import CalibrationError, Recording, StepSample

Array = npt.NDArray[Any]
FP16_MAX = 65504.0
#: Fewer images than this say too little about the tails of the activations.
MIN_IMAGES = 4
# Steps kept for comparing mixtures, and rows of a step at most.
STEP_SAMPLES, SAMPLE_ROWS = 16, 32
# A row of a causal model's step brings its whole KV cache along: of a kept step, so many bytes (or one row).
SAMPLE_BYTES = 64 << 20
# Tokens of a launch of random inputs.
RANDOM_TOKENS = 512
MAXIMA = "calibration.maxima"


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
        self.recording, self.seed = recording, seed
        self.step = 0
        self._parsed: dict[str, Graph] = {}
        self._unread = head_class(bundle.manifest.config).unread
        # Slot, the sample, and which rows of the launches it is made of.
        self._pending: tuple[int, StepSample, Array] | None = None
        resumed = bool(recording.done)
        for name in layer_graphs(self._graphs):
            graph = self._parsed[name] = Graph.load(bundle.graph_path(self._graphs[name]))
            tensors = self._ready(self._graphs[name], self.threads)[1]
            _agree(f"tensors of {name}", recording.tensors.setdefault(name, tensors), tensors)
            maxima = recording.maxima.setdefault(name, np.zeros((len(tensors), num_steps)))
            _agree(f"maxima of {name}", maxima.shape, (len(tensors), num_steps))
            for layer in graph.layers.values():
                made = TensorStatistics(len(layer.weight), num_steps)
                _agree(f"layer {layer.name}", layer.name in recording.layers or not resumed, True)
                kept = recording.layers.setdefault(layer.name, made)
                _agree(f"statistics of {layer.name}", (kept.channels, kept.steps), (made.channels, made.steps))

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        if graph.name not in self._parsed:
            return super()._load(graph, threads)
        parsed = self._parsed[graph.name]
        model, tensors = with_outputs(parsed)
        return open_session(model, parsed.folder, threads), tensors

    def _parts(self, info: GraphInfo, rows: int) -> int:
        return 1  # every launch is to be seen

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        if graph.name not in self._parsed:
            return super()._call(loaded, graph, inputs, outputs)
        layers = self._parsed[graph.name].layers.values()
        wanted = list(dict.fromkeys(layer.input for layer in layers if layer.input not in inputs))
        names = [*outputs, MAXIMA, *wanted]
        made = dict(zip(names, loaded[0].run(names, dict(inputs)), strict=True))
        self._add(graph.name, {**made, **inputs}, self._unread(graph.name, inputs))
        if graph.phase == "outer":
            self._begin_step(graph.name, inputs, made["z"])
        return [made[name] for name in outputs]

    def inputs_of_layers(self, name: str, feed: Mapping[str, Array]) -> dict[str, Array]:
        """What every layer of a graph gets, by layer, where the graph gets ``feed``; nothing is recorded."""
        layers = self._parsed[name].layers.values()
        wanted = list(dict.fromkeys(layer.input for layer in layers if layer.input not in feed))
        session = self._ready(self._graphs[name], self.threads)[0]
        made = dict(zip(wanted, session.run(wanted, dict(feed)), strict=True)) if wanted else {}
        return {layer.name: {**made, **feed}[layer.input] for layer in layers}

    def _add(self, name: str, values: Mapping[str, Array], unread: set[str]) -> None:
        """Statistics of one launch; ``unread`` is left over from somewhere."""
        for layer in self._parsed[name].layers.values():
            if layer.input in unread:
                continue
            if not np.isfinite(values[layer.input]).all():
                raise FloatingPointError(
                    f"layer {layer.name!r} got values that are not finite at step {self.step}; "
                    f"the model itself is broken there, before any quantisation"
                )
            self.recording.layers[layer.name].update(values[layer.input], self.step)
        maxima, now = self.recording.maxima[name], values[MAXIMA]
        if not np.isfinite(now).all():
            bad = self.recording.tensors[name][int(np.nonzero(~np.isfinite(now))[0][0])]
            raise FloatingPointError(f"tensor {bad!r} of graph {name!r} is not finite at step {self.step}")
        maxima[:, self.step] = np.maximum(maxima[:, self.step], now)

    def end_step(self, tokens: Array) -> None:
        """A step is over: tokens (P, B, D) were drawn from the z that the outer graph gave."""
        if self._pending is not None:
            slot, sample, rows = self._pending
            drawn = tokens.reshape(-1, tokens.shape[-1])  # conditional rows first, then the same tokens again
            sample.tokens = drawn[rows % len(drawn)]
            self.recording.samples[slot : slot + 1] = [sample]
        self._pending = None
        self.step += 1

    def _begin_step(self, graph: str, inputs: Mapping[str, Array], z: Array) -> None:
        """Reservoir sampling (algorithm R), its draws keyed by the count so that a resumed run goes on alike."""
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
        nothing = np.zeros((len(rows), 0), np.float32)  # until the step is over
        sample = StepSample(graph, self.step, self._feed(inputs, kept), labels, rows, nothing)
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

    def _rng(self, purpose: str, count: int) -> np.random.Generator:
        key = hashlib.sha256(f"{self.seed} {purpose} {count}".encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))

    def _slot(self, seen: int) -> int | None:
        """Which of the kept steps the next one replaces, or is; None: it is not kept."""
        if seen < STEP_SAMPLES:
            return seen
        draw = int(self._rng("step", seen).integers(seen + 1))
        return draw if draw < STEP_SAMPLES else None


def _agree(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise CalibrationError(f"the recording's {what} are not this model's; delete it and calibrate again")


def _check_samples(samples: Sequence[StepSample], bundle: Bundle, sampling: Sampling) -> None:
    """Raise CalibrationError unless samples that came from a file can be fed to the bundle's outer graphs."""
    config, graphs = bundle.manifest.config, bundle.manifest.precision_graphs("fp32")
    for number, sample in enumerate(samples):
        info = graphs.get(sample.graph)
        fits = info is not None and info.phase == "outer" and set(sample.feed) == {tensor.name for tensor in info.inputs}
        fits = fits and sample.step < sampling.num_iter and sample.tokens.shape[1] == config.token_dim
        _agree(f"sample {number}", fits, True)
        assert info is not None
        _check_feed(f"of sample {number}", info, sample.feed, config, sampling.size)
        labels = sample.labels
        fits = labels.min(initial=0) >= -1 and labels.max(initial=0) < config.num_classes
        _agree(f"labels of sample {number}", bool(fits), True)


def _check_feed(what: str, info: GraphInfo, feed: Mapping[str, Array], config: ArinarConfig, batch: int) -> None:
    """Raise CalibrationError unless inputs have the graph's types and shapes, its symbolic axes of one size each and no
    larger than a micro-batch has them, and integers point at what there is."""
    rows, length = 2 * batch, config.seq_len
    most = {"B": batch, "G": 2, "N": rows, "V": length, "P": length, "U": length}
    values = {"labels": (-1, config.num_classes), "mixed_labels": (0, config.num_classes), "rows": (0, batch)}
    sizes: dict[str, int] = {}
    for tensor in info.inputs:
        value = feed[tensor.name]
        _agree(f"type and axes of {tensor.name} {what}", (str(value.dtype), value.ndim), (tensor.dtype, len(tensor.shape)))
        for axis, size in zip(tensor.shape, value.shape, strict=True):
            known = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
            fits = size == known and (isinstance(axis, int) or size <= most.get(axis, rows))
            _agree(f"sizes of {tensor.name} {what} (axis {axis})", fits, True)
        low, high = values.get(tensor.name, (0, length)) if value.dtype.kind == "i" else (-np.inf, np.inf)
        fits = bool(((value >= low) & (value < high)).all())
        _agree(f"values of {tensor.name} {what}", fits, True)


def check_arguments(
    config: ArinarConfig,
    defaults: Defaults,
    *,
    num_images: int,
    labels: Sequence[int] | None = None,
    batch_size: int = 8,
    **arguments: Any,
) -> tuple[dict[str, Any], Sampling]:
    """What :func:`collect` would do with these arguments -> its settings (but for the model), and all images as one request.

    ``arguments``: seed and sampling arguments as for `Pipeline.generate`. Raises CalibrationError for too few images,
    ValueError for the other arguments.
    """
    if num_images < MIN_IMAGES:
        raise CalibrationError(f"num_images is {num_images}; ranges need at least {MIN_IMAGES} images (64 and more are better)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    given = list(range(config.num_classes)) if labels is None else list(labels)
    ids = Sampling.resolve(config, defaults, given, **arguments).labels.tolist()
    taken = [ids[i % len(ids)] for i in range(num_images)]
    sampling = Sampling.resolve(config, defaults, taken, **arguments)
    settings = {
        "num_images": num_images,
        "labels": ids,
        "seed": sampling.seed,
        **sampling.settings(),
        "batch_size": batch_size,
    }
    return settings, sampling


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
    settings, sampling = check_arguments(config, bundle.manifest.defaults, **arguments)
    settings = {"model": model_hashes(bundle), **settings}
    num_images, batch_size = len(sampling), settings["batch_size"]
    recording = Recording(settings)
    if partial is not None and partial.exists():
        recording = Recording.load(partial)
        if recording.settings != settings:
            differing = [key for key in settings if recording.settings.get(key) != settings[key]]
            raise CalibrationError(
                f"{partial} is the interrupted run of another calibration ({', '.join(differing)} differ); delete it, "
                f"or repeat that run's settings"
            )
        _check_samples(recording.samples, bundle, sampling)
        say(f"resuming after {recording.done} of {num_images} images")
    backend = RecordingBackend(bundle, recording, sampling.num_iter, sampling.seed, threads)
    graphs = bundle.manifest.precision_graphs("fp32")
    loop = Loop(backend, graphs, config, "stepwise", keep_first_step=False)  # every launch is to be seen
    while recording.done < num_images:
        rows = range(recording.done, min(recording.done + batch_size, num_images))
        backend.step = 0
        with closing(loop.walk(sampling.batch(rows))) as walk:
            for _, (step, state) in zip(range(sampling.num_iter), walk, strict=False):
                backend.end_step(backend.download(state.tokens[step.remaining : step.masked]))
            # (Closed before images are decoded: the VAE has no layers of interest.)
        recording.done += len(rows)
        if partial is not None:
            recording.save(partial)
        say(f"{recording.done} of {num_images} images recorded")
    return recording


def collect_random(bundle: Bundle, *, launches: int = 8, rows: int = 8, seed: int = 0) -> Recording:
    """Statistics over standard normal inputs, as one has them without calibrating: what calibration must beat."""
    config = bundle.manifest.config
    rows = max(1, min(rows, RANDOM_TOKENS // config.seq_len))  # every layer's input is held at once
    recording = Recording({"random": True})
    backend = RecordingBackend(bundle, recording, 1, seed, None)
    rng = np.random.default_rng(seed)
    length = config.seq_len
    classes = config.num_classes
    limits = {"labels": (-1, classes), "mixed_labels": (0, classes), "rows": (0, 1), "timestep": (0, TRAIN_STEPS)}
    infos = bundle.manifest.precision_graphs("fp32")
    for name in layer_graphs(infos):
        info = infos[name]
        positions = length - 1 if info.phase == "outer" and info.cached else length
        positions = config.token_dim if info.phase == "head" else positions
        for _ in range(launches):
            middle = int(rng.integers(1, length - 1)) if length > 2 else 1
            sizes = {"V": length - middle - 1, "P": 1, "U": middle, "G": 2, "B": rows, "N": rows, "M": rows}
            sizes["S"] = config.token_dim
            feed: dict[str, Array] = {}
            for tensor in info.inputs:
                shape = tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)
                if tensor.dtype == "int64":
                    feed[tensor.name] = rng.integers(*limits.get(tensor.name, (0, positions)), shape)
                else:
                    feed[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
            for layer, value in backend.inputs_of_layers(name, feed).items():
                recording.layers[layer].update(value, 0)
    return recording
