"""What executes graphs, one file each behind one seam (`base`), and the choice among them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypedDict

from arinar.schemes import SCHEMES
from arinar.text import install_hint, shown

from ..bundle import Bundle, BundleError
from ..machine import onnxruntime_distribution
from .base import Backend

#: Backend name -> module of this package and class. A class is made with (bundle, precision, **options); its keyword-only
#: arguments are the options that `Pipeline.load` passes on.
BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime-cpu": ("onnxruntime_cpu", "OnnxRuntimeCpu"),
    "onnxruntime-cuda": ("onnxruntime_cuda", "OnnxRuntimeCuda"),
    "tensorrt": ("tensorrt", "TensorRt"),
    "openvino": ("openvino", "OpenVino"),
}
#: Names that `arinar build` has for a backend with an option set: name -> backend, options.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"tensorrt-rtx": ("tensorrt", {"module": "tensorrt_rtx"})}


class BackendOptions(TypedDict, total=False):
    """Every backend's options, as `Pipeline.load` takes them: the keyword-only arguments of the classes, whose docstrings
    say what they do. One that the chosen backend does not have is an error, or left out where none was named."""

    threads: int | None  # onnxruntime-cpu, openvino
    low_memory: bool  # onnxruntime-cpu, openvino
    device: int  # onnxruntime-cuda, tensorrt
    cuda_graphs: bool  # onnxruntime-cuda, tensorrt
    cuda: Any  # the same, for tests
    tf32: bool  # onnxruntime-cuda
    wait: bool  # onnxruntime-cuda
    log_severity: int  # onnxruntime-cuda
    module: str | None  # tensorrt


#: Options that ask for a device: where that is missing, nothing else will do.
WISHES = ("device", "cuda")


def backend_class(name: str) -> Any:
    """Raises BundleError for an unknown name."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise BundleError(f"backend is {shown(name)}; choose one of {', '.join([*BACKENDS, *ALIASES])}")
    module, attribute = BACKENDS[name]
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


def backend_options(name: str) -> list[str]:
    """The options that a backend has."""
    parameters = inspect.signature(backend_class(name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def obstacle(bundle: Bundle, precision: str, name: str, device: int = 0) -> str | None:
    """Why a backend cannot run a bundle's precision on this machine, in a line; None: it can. Never raises.

    ``device``: index of the GPU. What is asked is whether package, device and (of TensorRT) engines are there, not whether
    they work.
    """
    try:
        scheme = SCHEMES[bundle.manifest.scheme(precision)]
        if name not in scheme.runs_on:
            return f"{name} has no kernels for {precision}"
        if name == "onnxruntime-cpu":
            return None if onnxruntime_distribution() else f"ONNX Runtime is not installed; {install_hint('cpu')} installs it"
        if name == "openvino":  # whose head is ONNX Runtime's
            from .openvino import missing

            return missing(bfloat16=bool(scheme.runs)) or obstacle(bundle, scheme.runs or precision, "onnxruntime-cpu")
        from .cuda import device_info, load_runtime

        capability = device_info(load_runtime(), device).compute_capability
        if name == "tensorrt":
            from .tensorrt import choose_module

            choose_module(bundle, precision, capability)
        else:
            from .onnxruntime_cuda import load_onnxruntime

            load_onnxruntime()
    except Exception as error:  # no driver, GPU, library or engine, or a broken one
        return str(error)
    return None


def choose_backend(bundle: Bundle, precision: str, missing: list[str] | None = None, device: int = 0) -> str:
    """The best backend that this machine and bundle offer: engines that fit, ONNX Runtime on a GPU, else on the CPU (OpenVINO
    is no faster in the same precision: docs/precision.md).

    device : index of the GPU that is asked. Never raises: what is missing or broken is passed over, and told to
    ``missing``, a reason each.
    """
    reasons = [] if missing is None else missing
    for name in ("tensorrt", "onnxruntime-cuda"):
        reason = obstacle(bundle, precision, name, device)
        if reason is None:
            return name
        if reason not in reasons:
            reasons.append(reason)
    return "onnxruntime-cpu"


def _backend_of(precision: str) -> str | None:
    """The one backend that a precision without graphs of its own is computed by."""
    scheme = SCHEMES.get(precision)
    return scheme.runs_on[0] if scheme is not None and scheme.runs else None


def open_backend(bundle: Bundle, name: str | None, precision: str, **options: Any) -> Backend:
    """Open a backend by name (None: the best available).

    Options of other backends are an error with a named backend. Where it was chosen here they are left out, unless they
    ask for a device that it does not use. Raises BundleError for an unknown name, a backend that cannot run here, or an
    option that it does not have.
    """
    missing: list[str] = []
    if isinstance(name, str) and name in ALIASES:
        name, preset = ALIASES[name]
        options = preset | options
    device = 0 if options.get("device") is None else options["device"]
    needed = _backend_of(precision)
    if needed is not None and name not in (None, needed):
        raise BundleError(f"precision {precision} is of backend {needed}, not of {shown(name)}; leave the backend out")
    chosen = name or needed or choose_backend(bundle, precision, missing, device)
    known = backend_options(chosen)
    for option in [option for option in options if option not in known]:
        if name is not None or not any(option in backend_options(other) for other in BACKENDS):
            told = ", ".join(name for name in known if name != "cuda")  # which is for tests
            raise BundleError(f"backend {chosen} has no option {option!r}; it has {told}")
        if option in WISHES and options[option] is not None:
            raise BundleError(
                f"{option}={shown(options[option])} asks for a GPU, and none can be used here: {'; '.join(missing)}. Leave "
                f"{option} out to generate on the CPU"
            )
        del options[option]
    backend: Backend = backend_class(chosen)(bundle, precision, **options)
    return backend
