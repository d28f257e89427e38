"""Stand-ins for `cuda.bindings.driver` and `cuda.bindings.nvrtc`, beside those of `fake_gpu`: kernels are really computed, by
the CPU, from the source that was given to the compiler, when the fake stream comes to them.

`FakeDriver.launches` lists every launch that the program issued; of a captured sequence, one each time it is captured.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from cpu_kernels import compiled
from fake_gpu import STREAM, FakeCudaRuntime

Size = tuple[int, int, int]


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209


@dataclass(frozen=True)
class KernelLaunch:
    name: str
    grid: Size
    block: Size
    shared_bytes: int


class FakeDriver:
    """What `arinar.runtime.backends.cuda` uses of the driver. ``compute`` False: launches are listed, nothing is computed."""

    CUresult = CUresult

    def __init__(self, runtime: FakeCudaRuntime, *, compute: bool = True) -> None:
        self.runtime, self.compute = runtime, compute
        self.schedule = 0  # the order of a block's threads, see `cpu_kernels`
        self.launches: list[KernelLaunch] = []
        self.images: list[bytes] = []

    def cuGetErrorName(self, error: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, CUresult(error).name.encode()

    def cuModuleLoadData(self, image: bytes) -> tuple[CUresult, Any]:
        assert isinstance(image, bytes) and self.runtime.captured is None, "a module is loaded while capturing"
        self.images.append(image)
        program = json.loads(image)
        if program["architecture"] != "sm_90":
            return CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        headers = tuple(program["headers"].items())
        return CUresult.CUDA_SUCCESS, compiled(program["text"], headers) if self.compute else None

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[CUresult, Any]:
        assert isinstance(name, bytes) and (module is None or name.decode() in module.names)
        return CUresult.CUDA_SUCCESS, (module, name.decode())

    def cuLaunchKernel(self, function: Any, *sizes: Any) -> tuple[CUresult]:
        *shape, shared_bytes, stream, (values, types), extra = sizes
        grid, block = tuple(shape[:3]), tuple(shape[3:])
        assert stream == STREAM and not extra and len(shape) == 6 and min(shape) >= 1 and block[0] * block[1] * block[2] <= 1024
        module, name = function
        for value, kind in zip(values, types, strict=True):
            if kind is ctypes.c_void_p and value:
                self.runtime.block_of(value, 1)
        self.launches.append(KernelLaunch(name, grid, block, shared_bytes))
        self.runtime.log.append(("cuLaunchKernel", name, grid, block))
        if module is not None:
            self.runtime.enqueue(lambda: module.launch(name, grid, block, values, types, schedule=self.schedule))
        return (CUresult.CUDA_SUCCESS,)


class FakeNvrtc:
    """A compiler whose machine code is the source. ``programs`` counts what it has compiled."""

    nvrtcResult = SimpleNamespace(NVRTC_SUCCESS=0, NVRTC_ERROR_COMPILATION=6)

    def __init__(self, architectures: Sequence[int] = (80, 90), release: tuple[int, int] = (13, 5)) -> None:
        self.architectures, self.release, self.programs, self.log = list(architectures), release, 0, b""

    def nvrtcVersion(self) -> tuple[int, int, int]:
        return (0, *self.release)

    def nvrtcGetSupportedArchs(self) -> tuple[int, list[int]]:
        return 0, self.architectures

    def nvrtcGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"text of the error"

    def nvrtcCreateProgram(self, text: bytes, name: bytes, count: int, headers: list[bytes], names: list[bytes]) -> Any:
        assert count == len(headers) == len(names) and name.endswith(b".cu")
        given = {key.decode(): value.decode() for key, value in zip(names, headers, strict=True)}
        return 0, {"text": text.decode(), "headers": given}

    def nvrtcCompileProgram(self, program: Any, count: int, options: list[bytes]) -> tuple[int]:
        assert count == len(options)
        (architecture,) = (text.decode().partition("=")[2] for text in options if text.startswith(b"--gpu-architecture="))
        assert int(architecture.removeprefix("sm_")) in self.architectures
        program["architecture"] = architecture
        self.programs += 1
        return (6 if self.log else 0,)

    def nvrtcGetProgramLogSize(self, program: Any) -> tuple[int, int]:
        return 0, len(self.log)

    def nvrtcGetProgramLog(self, program: Any, buffer: bytes) -> tuple[int]:
        ctypes.memmove(buffer, self.log, len(self.log))
        return (0,)

    def nvrtcGetCUBINSize(self, program: Any) -> tuple[int, int]:
        return 0, len(json.dumps(program))

    def nvrtcGetCUBIN(self, program: Any, buffer: bytes) -> tuple[int]:
        ctypes.memmove(buffer, json.dumps(program).encode(), len(buffer))
        return (0,)

    def nvrtcDestroyProgram(self, program: Any) -> tuple[int]:
        return (0,)
