"""What executes graphs, one file each behind one seam (`base`), and the choice among them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from ..bundle import Bundle, BundleError
from .base import Backend

#: Backend name -> module of this package and class. A class is made with (bundle, precision, **options); its keyword-only
#: arguments are the options that `Pipeline.load` passes on.
BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime-cpu": ("onnxruntime_cpu", "OnnxRuntimeCpu"),
    "onnxruntime-cuda": ("onnxruntime_cuda", "OnnxRuntimeCuda"),
    "tensorrt": ("tensorrt", "TensorRt"),
}


def backend_class(name: str) -> Any:
    """Raises BundleError for an unknown name."""
    if name not in BACKENDS:
        raise BundleError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name]
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


def backend_options(name: str) -> list[str]:
    """The options that a backend has."""
    parameters = inspect.signature(backend_class(name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def choose_backend(bundle: Bundle, precision: str) -> str:
    """The best backend that this machine and bundle offer: engines that fit, ONNX Runtime on a GPU, else the CPU.

    Never raises: what is missing or broken is passed over. Ask for a backend by name to learn why it was.
    """
    try:
        from .cuda import device_info, load_runtime

        capability = device_info(load_runtime()).compute_capability
    except Exception:  # no driver, no GPU, no cuda-bindings, or a broken one
        return "onnxruntime-cpu"
    try:
        from .tensorrt import choose_module

        choose_module(bundle, precision, capability)
        return "tensorrt"
    except Exception:  # no library, no engine, or a broken one
        pass
    try:
        from .onnxruntime_cuda import load_onnxruntime

        load_onnxruntime()
        return "onnxruntime-cuda"
    except Exception:  # as above
        return "onnxruntime-cpu"


def open_backend(bundle: Bundle, name: str | None, precision: str, **options: Any) -> Backend:
    """Open a backend by name (None: the best available).

    Options of other backends are an error with a named backend, and are left out where it was chosen here. Raises
    BundleError for an unknown name, a backend that cannot run here, or an option that it does not have.
    """
    chosen = name or choose_backend(bundle, precision)
    known = backend_options(chosen)
    for option in [option for option in options if option not in known]:
        if name is not None or not any(option in backend_options(other) for other in BACKENDS):
            told = ", ".join(name for name in known if name != "cuda")  # which is for tests
            raise BundleError(f"backend {chosen} has no option {option!r}; it has {told}")
        del options[option]
    backend: Backend = backend_class(chosen)(bundle, precision, **options)
    return backend
