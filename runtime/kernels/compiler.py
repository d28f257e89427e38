"""Compiling the kernels with NVRTC, which needs neither GPU nor driver, and keeping what was compiled.

On top of `cuda.bindings.nvrtc` (packages cuda-bindings and nvidia-cuda-nvrtc). Reference: https://docs.nvidia.com/cuda/nvrtc/
A kept file is a line of JSON, what it was made of and its hash, and the cubin behind it. Its name holds the source's hash, the
architecture and the compiler's version, so it is never out of date: another source has another file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

from arinar.files import replacing
from arinar.reading import check_regular, parse_json
from arinar.text import install_hint, one_line

from .source import Source

INSTALL_HINT = f"{install_hint('gpu')}, or `pip install nvidia-cuda-nvrtc cuda-bindings`, brings it"
SUFFIX = ".cubin"
#: A cubin of ours has some hundred thousand bytes.
MOST_BYTES = 1 << 26


class KernelError(RuntimeError):
    """The kernels cannot be had for this GPU. The message says why, and what mends it."""


def cubin(source: Source, compute_capability: str, folder: Path) -> bytes:
    """Machine code of a module for a GPU ("9.0"): the kept one, or compiled now and kept in the folder.

    Where the compiler is missing, a kept one of any compiler will do. A folder that cannot be written is a warning: the code
    is compiled anew each time. Raises KernelError where there is no compiler, or it does not know the GPU.
    """
    architecture = f"sm_{compute_capability.replace('.', '')}"
    stem = f"{source.name}-{architecture}-{source.sha256[:16]}"
    try:
        nvrtc = load_nvrtc()
        compiler = version(nvrtc)
    except KernelError:
        for path in sorted(folder.glob(f"{stem}-nvrtc*{SUFFIX}"), reverse=True):
            kept = read(path, source, architecture)
            if kept is not None:
                return kept
        raise
    path = folder / f"{stem}-nvrtc{compiler}{SUFFIX}"
    code = read(path, source, architecture)
    if code is None:
        code = compiled(source, architecture, nvrtc)
        try:
            write(path, code, source, architecture, compiler)
        except OSError as error:
            warnings.warn(
                f"the compiled kernels are not kept, and compiled at every start: {error}", RuntimeWarning, stacklevel=2
            )
    return code


def read(path: Path, source: Source, architecture: str) -> bytes | None:
    """The code of a kept file; None where there is none, it is of something else, or it is damaged."""
    try:
        check_regular(path)
        if path.stat().st_size > MOST_BYTES:
            return None
        head, _, code = path.read_bytes().partition(b"\n")
        told = parse_json(head.decode("utf-8"))
    except (OSError, ValueError):
        return None
    want = {"source": source.sha256, "architecture": architecture, "sha256": hashlib.sha256(code).hexdigest()}
    return code if isinstance(told, dict) and told.items() >= want.items() else None


def write(path: Path, code: bytes, source: Source, architecture: str, compiler: str) -> None:
    """Raises OSError, naming the file and the reason."""
    told = {"source": source.sha256, "architecture": architecture, "compiler": compiler}
    head = json.dumps({**told, "sha256": hashlib.sha256(code).hexdigest()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(head.encode() + b"\n" + code)


def load_nvrtc() -> Any:
    """The module `cuda.bindings.nvrtc`, its library loaded. Raises KernelError with the way to install it."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()  # what loads the library
        return nvrtc
    except Exception as error:  # the package, or the library: RuntimeError or one of the bindings' own
        raise KernelError(f"NVIDIA's compiler NVRTC cannot be loaded ({one_line(error)}); {INSTALL_HINT}") from error


def version(nvrtc: Any) -> str:
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def compiled(source: Source, architecture: str, nvrtc: Any) -> bytes:
    """Machine code of a module. Raises KernelError with what the compiler says."""
    known = [f"sm_{number}" for number in call(nvrtc, "nvrtcGetSupportedArchs")]
    if architecture not in known:
        raise KernelError(
            f"NVRTC {version(nvrtc)} compiles for {', '.join(known)}, this GPU is {architecture}; "
            f"`pip install --upgrade nvidia-cuda-nvrtc` brings one that knows newer GPUs"
        )
    headers = {name.encode(): text.encode() for name, text in source.headers.items()}
    program = call(
        nvrtc,
        "nvrtcCreateProgram",
        source.text.encode(),
        source.file.encode(),
        len(headers),
        list(headers.values()),
        list(headers),
    )
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = text_of(nvrtc, program, "nvrtcGetProgramLog").decode(errors="replace")
            raise KernelError(f"{source.file} does not compile for {architecture}: {one_line(log)[:2000]}")
        return text_of(nvrtc, program, "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def text_of(nvrtc: Any, program: Any, what: str) -> bytes:
    buffer = bytes(call(nvrtc, f"{what}Size", program))
    call(nvrtc, what, program, buffer)  # filled in place
    return buffer


def call(nvrtc: Any, name: str, *args: Any) -> Any:
    error, *values = getattr(nvrtc, name)(*args)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"{name} failed: {nvrtc.nvrtcGetErrorString(error)[1]!r}")
    return values[0] if len(values) == 1 else values


__all__ = ["KernelError", "cubin", "load_nvrtc"]
