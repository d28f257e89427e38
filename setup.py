"""Packaging: one import name, `arinar`, out of several top-level folders."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "arinar" / "__init__.py").read_text()).group(1)

package_dir = {
    "arinar": "arinar",
    "arinar.export": "export",
    "arinar.runtime": "runtime",
    "arinar.runtime.backends": "runtime/backends",
    "arinar.runtime.kernels": "runtime/kernels",
    "arinar.calibration": "calibration",
    "arinar.measure": "measure",
    "arinar.serve": "serve",
    "arinar.cli": "cli",
}

# 1.23 is the first whose CPU kernels include Attention, 1.24.4 the first that keeps external data inside the folder.
ONNXRUNTIME = "onnxruntime>=1.24.4"
# Before 1.31 Pad, ReduceMax, ReduceMin and ConstantOfShape of our opset have no CUDA kernels, and the norms of our CUDA form
# keep their statistics in float16. Its extras name the libraries that it links, but for cuBLAS.
ONNXRUNTIME_GPU = "onnxruntime-gpu[cuda,cudnn]>=1.31"
# Before 12.9 it raises, where there is no driver, what is no error code.
CUDA_BINDINGS = "cuda-bindings>=12.9"
EXPORT = ["torch>=2.9", "onnx>=1.18", "onnxscript>=0.5", "safetensors>=0.5"]
# Compiles our kernels on the machine that runs them.
NVRTC = "nvidia-cuda-nvrtc>=13"
DEMO = ["scikit-learn>=1.4"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.7", "prometheus-client>=0.20", "python-multipart>=0.0.18"]

setup(
    name="arinar",
    version=VERSION,
    description="ARINAR image generation in production: ONNX graphs, TensorRT engines, a torch-free runtime",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=package_dir,
    packages=list(package_dir),
    package_data={
        "arinar": ["py.typed", "imagenet_classes.txt", "weights/*.safetensors"],
        "arinar.runtime.kernels": ["*.cu", "*.cuh"],
        "arinar.serve": ["page.html"],
    },
    install_requires=["numpy>=1.26", "pillow>=10.1", "click>=8.1", "tqdm>=4.66"],
    extras_require={
        # What executes graphs. `cpu` and `gpu` exclude each other: both packages write the same files.
        "cpu": [ONNXRUNTIME],
        "gpu": [ONNXRUNTIME_GPU, "nvidia-cublas>=13,<14", CUDA_BINDINGS, NVRTC],
        # 10.1 is the first whose contexts can share their scratch memory.
        "tensorrt": ["tensorrt>=10.1", CUDA_BINDINGS, NVRTC],
        "tensorrt-rtx": ["tensorrt-rtx>=1.0", CUDA_BINDINGS, NVRTC],
        # Beside `cpu`: bfloat16 on CPUs that have it.
        "openvino": [ONNXRUNTIME, "openvino>=2026.2"],
        # What trains and exports.
        "export": EXPORT,
        "train": ["torch>=2.9", "safetensors>=0.5", *DEMO],
        # `arinar demo`: export, run on the CPU, judge.
        "demo": [*EXPORT, *DEMO, ONNXRUNTIME],
        # `arinar serve`; the same under Ray Serve, in several replicas, and the workers of `arinar sample`.
        "serve": SERVE,
        "ray": [*SERVE, "ray[serve]>=2.60"],
        # `arinar evaluate --features inception`. torchvision's version must be the one that fits to PyTorch's.
        "evaluate": ["torch>=2.9", "torchvision", "torch-fidelity>=0.4"],
        # The documentation as a site: `mkdocs serve`.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.11"],
        "dev": [
            *EXPORT,
            *DEMO,
            *SERVE,
            ONNXRUNTIME,
            "openai>=1.60",
            "scipy>=1.11",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "polygraphy>=0.49",
            "ruff>=0.11",
            "mypy>=1.15",
            "build>=1.2",
        ],
    },
    entry_points={"console_scripts": ["arinar=arinar.cli:main"]},
    options={"editable_wheel": {"mode": "strict"}},
)
