"""TensorRT: engines of the bundle, run by `tensorrt`, `tensorrt_lean` (version compatible engines) or `tensorrt_rtx`.

What differs between versions is asked for with `hasattr`, never derived from a version number. References, by class:
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Runtime.html, .../Engine.html,
.../ExecutionContext.html, .../Logger.html
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections import deque
from collections.abc import Mapping
from typing import Any

from arinar.text import install_hint

from ..bundle import Bundle, BundleError
from .cuda import Cuda, CudaError, DeviceBuffer, GpuMemoryError
from .engines import MODULES, RUNTIME_ONLY, Engine, EngineError, build_command, find_engines, list_engines
from .gpu import Binding, CudaBackend, check_buffer

#: Libraries that run engines, best first.
LIBRARIES = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
INSTALL_HINTS = {
    "tensorrt": f"{install_hint('tensorrt')} installs it",
    "tensorrt_lean": "`pip install tensorrt_lean` installs it",
    "tensorrt_rtx": f"{install_hint('tensorrt-rtx')} installs it",
}
#: Phases whose graphs every generation launches; which of the head's it needs depends on its arguments.
ALWAYS = ("outer", "decode")


class TensorRt(CudaBackend):
    """Backend that runs a bundle's engines.

    Parameters
    ----------
    module : "tensorrt", "tensorrt_lean" or "tensorrt_rtx"; None means the first of them that is installed and has
        engines in the bundle that run on this GPU.
    cuda_graphs : record the launches of a micro-batch and replay them. It costs an execution context for every shape
        that a launch has (they share their scratch memory); without, there is one per graph and profile.
    device : index of the GPU.

    Raises
    ------
    NoGpuError, EngineError, BundleError : the driver, a library or an engine that fits is missing.
    CudaError : an engine cannot be loaded; the message holds what the library logged.
    """

    name = "tensorrt"
    native_rows = 16

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        *,
        module: str | None = None,
        cuda_graphs: bool = True,
        device: int = 0,
        cuda: Cuda | None = None,
    ) -> None:
        super().__init__(bundle, precision, cuda_graphs=cuda_graphs, device=device, cuda=cuda)
        capability = self.cuda.info.compute_capability
        self.module = choose_module(bundle, precision, capability, module)
        self._trt = load_library(self.module)
        self._log = message_log(self._trt)
        self._found = functools.partial(
            find_engines,
            bundle,
            module=self.module,
            version=self._trt.__version__,
            compute_capability=capability,
            precision=precision,
        )
        self._runtime: Any = self._trt.Runtime(self._log)
        if self._runtime is None:
            raise CudaError(f"{self.module} cannot start: {self._log.recent()}")
        self._engines: dict[str, Any] = {}
        self._in_place: dict[str, dict[str, str]] = {}
        self.prepare(*always(bundle, precision))

    # Engines.

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        missing = [name for name in graphs if name not in self._engines]
        if not missing:
            return
        self._activate()
        for name in missing:
            self._info(name)
        for name, engine in self._found(missing).items():
            self._engines[name] = self._load(name, engine)

    def _load(self, graph: str, engine: Engine) -> Any:
        engine.verify()
        if engine.info.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            # Such an engine carries its own runtime, as code for the host. The file is what the sidecar says it is, and
            # the sidecar is as trustworthy as the bundle.
            self._runtime.engine_host_code_allowed = True
        self._log.clear()
        loaded = self._runtime.deserialize_cuda_engine(engine.path.read_bytes())
        if loaded is None:
            command = build_command(self._bundle, self.module, self._precision, engine.info.version_compatible)
            raise self._failure(f"{self.module} cannot load the engine {engine.path}", f"Build it again: `{command}`")
        self._check(graph, loaded)
        return loaded

    def _check(self, graph: str, engine: Any) -> None:
        """The engine's tensors must be the graph's: names, types, all of them in device memory."""
        info, trt = self._info(graph), self._trt
        known = {tensor.name: tensor for tensor in (*info.inputs, *info.outputs)}
        aliases: dict[str, str] = {}
        for name in tensor_names(engine):
            if name not in known:
                raise EngineError(f"the engine of graph {graph!r} has a tensor {name!r} that the graph lacks; build it again")
            dtype = str(trt.nptype(engine.get_tensor_dtype(name)).__name__)
            if dtype != known[name].dtype:
                raise EngineError(f"the engine of {graph!r} takes {name!r} as {dtype}, the graph as {known[name].dtype}")
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"the engine of graph {graph!r} wants {name!r} in host memory; build it again")
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT and hasattr(engine, "get_aliased_input_tensor"):
                source = engine.get_aliased_input_tensor(name)
                if source:
                    aliases[name] = source
        self._in_place[graph] = aliases

    def _aliases(self, graph: str) -> Mapping[str, str]:
        return self._in_place[graph]

    # Launches.

    def _bind(self, graph: str, binding: Binding, buffers: Mapping[str, DeviceBuffer], addresses: dict[str, int]) -> None:
        engine = self._engines[graph]
        if binding.prepared is None:
            binding.keep["inputs"], binding.keep["outputs"] = self._tensors(engine)
        inputs, outputs = binding.keep["inputs"], binding.keep["outputs"]
        shapes = {name: buffers[name].shape for name in inputs}
        if shapes != binding.shapes:
            self._shape(graph, binding, shapes)
            for name in outputs:
                if name not in buffers:
                    raise CudaError(f"graph {graph!r}: nothing is given for its output {name!r}")
                dtype = self._trt.nptype(engine.get_tensor_dtype(name))
                check_buffer(graph, name, buffers[name], tuple(binding.prepared.get_tensor_shape(name)), dtype)
        for name in (*inputs, *outputs):
            if binding.addresses.get(name) != addresses[name]:
                if not binding.prepared.set_tensor_address(name, addresses[name]):
                    raise self._failure(f"graph {graph!r}: the address of {name!r} was refused")
                binding.addresses[name] = addresses[name]

    def _shape(self, graph: str, binding: Binding, shapes: dict[str, tuple[int, ...]]) -> None:
        """A context for these input shapes: a new one, or the binding's with other shapes."""
        engine = self._engines[graph]
        profile = self._profile(graph, engine, shapes)
        if binding.prepared is None or binding.keep["profile"] != profile:
            # Never switched in a context that has run: a context per profile.
            contexts = binding.keep.setdefault("contexts", {})
            if profile not in contexts:
                contexts[profile] = self._context(graph, engine, profile)
            binding.prepared, binding.keep["profile"] = contexts[profile], profile
            binding.shapes, binding.addresses = {}, {}
        context = binding.prepared
        for name, shape in shapes.items():
            if binding.shapes.get(name) != shape and not context.set_input_shape(name, shape):
                raise self._failure(f"graph {graph!r}: the shape {shape} of input {name!r} was refused")
        unset = context.infer_shapes()
        if unset:
            raise CudaError(f"graph {graph!r}: the shapes of {', '.join(unset)} do not follow from those of its inputs")
        binding.shapes = shapes
        if self._shared_scratch:
            self._log.clear()
            nbytes = int(context.update_device_memory_size_for_shapes())
            if not nbytes and self._log.recent():  # 0 is what it returns on an error, too
                raise self._failure(f"graph {graph!r}: no size of scratch memory for the shapes {shapes}")
            scratch = self._pool("scratch", max(1, nbytes))
            context.set_device_memory(scratch.pointer, scratch.nbytes)

    @property
    def _shared_scratch(self) -> bool:
        """Whether contexts can be given their scratch memory: then all of them use the same."""
        context = self._trt.IExecutionContext
        return (
            hasattr(self._trt, "ExecutionContextAllocationStrategy")
            and hasattr(context, "set_device_memory")
            and hasattr(context, "update_device_memory_size_for_shapes")
        )

    def _context(self, graph: str, engine: Any, profile: int) -> Any:
        self._log.clear()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED if self._shared_scratch else None
        if hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            # RTX compiles kernels for a shape while it runs, and swaps them in later; a captured graph would keep the
            # provisional ones. Compile at once.
            config = engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if strategy is not None:
                config.set_execution_context_allocation_strategy(strategy)
            context = engine.create_execution_context(config)
        elif strategy is not None:
            context = engine.create_execution_context(strategy)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise self._failure(f"graph {graph!r}: no execution context")
        if profile:  # (a context has the first to begin with)
            try:
                taken = context.set_optimization_profile_async(profile, self.cuda.stream)
            except Exception as error:  # some versions raise in place of returning False
                raise self._failure(f"graph {graph!r}: profile {profile} was refused ({error})") from error
            if not taken:
                raise self._failure(f"graph {graph!r}: profile {profile} was refused")
        return context

    def _profile(self, graph: str, engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first optimisation profile that all shapes lie in."""
        ranges = []
        for profile in range(engine.num_optimization_profiles):
            outside = None
            for name, shape in shapes.items():
                least = most = tuple(engine.get_tensor_shape(name))
                if -1 in least:
                    least, _, most = (tuple(limit) for limit in engine.get_tensor_profile_shape(name, profile))
                if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                    outside = f"input {name!r} has shape {shape}, the engine takes {least} to {most}"
                    break
            if outside is None:
                return profile
            ranges.append(outside)
        raise EngineError(
            f"graph {graph!r}: {'; '.join(ranges)}. Use a smaller batch size (--batch-size), or build for this one: "
            f"`{build_command(self._bundle, self.module, self._precision)} --batch MIN:OPT:MAX`"
        )

    def _run(self, graph: str, binding: Binding) -> None:
        context = binding.prepared
        if not context.execute_async_v3(self.cuda.stream):
            raise self._failure(f"graph {graph!r} did not run")
        if self._current is not None and not self.cuda.capturing and hasattr(context, "is_stream_capturable"):
            self._current[0].capture &= bool(context.is_stream_capturable(self.cuda.stream))

    def _failure(self, what: str, remedy: str = "") -> CudaError:
        logged = self._log.recent()
        self._log.clear()
        if "out of memory" in logged.lower() or "outofmemory" in logged.lower():
            return GpuMemoryError(f"{what} ({logged})")
        return CudaError(f"{what}; {self.module} says: {logged or 'nothing'}. {remedy}".rstrip(" "))

    def _tensors(self, engine: Any) -> tuple[list[str], list[str]]:
        names = tensor_names(engine)
        inputs = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        return inputs, [name for name in names if name not in inputs]


def tensor_names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]


def load_library(module: str) -> Any:
    """Import a TensorRT library. Raises BundleError with the way to install it."""
    if module not in LIBRARIES:
        raise BundleError(f"module is {module!r}; choose one of {', '.join(LIBRARIES)}")
    try:
        return importlib.import_module(module)
    except Exception as error:  # missing shared objects show as OSError, ImportError or RuntimeError
        raise BundleError(f"the library {module} cannot be imported ({error}); {INSTALL_HINTS[module]}") from error


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def choose_module(bundle: Bundle, precision: str, compute_capability: str, module: str | None = None) -> str:
    """The library to run a bundle's engines with: the named one, or the best that is installed and has engines.

    Raises EngineError (with what to build) or BundleError (with what to install).
    """
    if module is not None:
        load_library(module)
        return module
    built = {engine.info.module for engine in list_engines(bundle) if engine.info.precision == precision}
    refusals: list[str] = []
    present = [name for name in LIBRARIES if installed(name)]
    for name in present:
        if RUNTIME_ONLY.get(name, name) not in built:
            continue
        try:
            library = load_library(name)
            find_engines(
                bundle,
                always(bundle, precision),
                module=name,
                version=library.__version__,
                compute_capability=compute_capability,
                precision=precision,
            )
            return name
        except BundleError as error:
            refusals.append(str(error))
    if refusals:
        raise EngineError("; ".join(refusals))
    if not present:
        wanted = sorted(built) or ["tensorrt"]
        raise BundleError(f"no TensorRT library is installed; {INSTALL_HINTS.get(wanted[0], INSTALL_HINTS['tensorrt'])}")
    builder = RUNTIME_ONLY.get(present[0], present[0])
    have = f"it has engines of {', '.join(sorted(built))}" if built else "it has none"
    raise EngineError(
        f"the bundle has no {precision} engines for {', '.join(present)} ({have}). "
        f"Run `{build_command(bundle, builder if builder in MODULES.values() else present[0], precision)}`"
    )


def always(bundle: Bundle, precision: str) -> list[str]:
    """The graphs that every generation with a bundle launches."""
    return [name for name, info in bundle.manifest.precision_graphs(precision).items() if info.phase in ALWAYS]


@functools.cache
def message_log(trt: Any) -> Any:
    """The logger of a library: one for the process, as the library keeps the first that it is given."""

    class MessageLog(trt.ILogger):  # type: ignore[misc]
        """Keeps the last warnings and errors, so that they can be part of our error messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(str(message))

        def clear(self) -> None:
            self.messages.clear()

        def recent(self) -> str:
            return "; ".join(self.messages)

    return MessageLog()


__all__ = ["LIBRARIES", "TensorRt", "choose_module", "load_library"]
