"""What executes graphs, one file each behind one seam (`base`), and the choice among them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from arinar.text import shown

from ..bundle import Bundle, BundleError
from .base import Backend

#: Backend name -> module of this package and class. A class is made with (bundle, precision, **options); its keyword-only
#: arguments are the options that `Pipeline.load` passes on.
BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime-cpu": ("onnxruntime_cpu", "OnnxRuntimeCpu"),
    "onnxruntime-cuda": ("onnxruntime_cuda", "OnnxRuntimeCuda"),
    "tensorrt": ("tensorrt", "TensorRt"),
}
#: Names that `arinar build` has for a backend with an option set: name -> backend, options.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"tensorrt-rtx": ("tensorrt", {"module": "tensorrt_rtx"})}
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


def choose_backend(bundle: Bundle, precision: str, missing: list[str] | None = None, device: int = 0) -> str:
    """The best backend that this machine and bundle offer: engines that fit, ONNX Runtime on a GPU, else the CPU.

    device : index of the GPU that is asked. Never raises: what is missing or broken is passed over, and told to
    ``missing``, a reason each.
    """
    reasons = [] if missing is None else missing
    try:
        from .cuda import device_info, load_runtime

        capability = device_info(load_runtime(), device).compute_capability
    except Exception as error:  # no driver, no GPU, no cuda-bindings, or a broken one
        reasons.append(str(error))
        return "onnxruntime-cpu"
    try:
        from .tensorrt import choose_module

        choose_module(bundle, precision, capability)
        return "tensorrt"
    except Exception as error:  # no library, no engine, or a broken one
        reasons.append(str(error))
    try:
        from .onnxruntime_cuda import load_onnxruntime

        load_onnxruntime()
        return "onnxruntime-cuda"
    except Exception as error:  # as above
        reasons.append(str(error))
        return "onnxruntime-cpu"


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
    chosen = choose_backend(bundle, precision, missing, device) if name is None else name
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
