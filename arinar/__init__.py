"""ARINAR in production: train, export to ONNX, build engines, generate images without PyTorch.

The command line is ``arinar`` (see ``arinar --help``); applications import ``arinar.runtime``.
Importing this package loads nothing but the standard library.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the other rooms (`export/`, `runtime/`, ...) are siblings of this folder; installed, they are inside it.
# Either way they are imported as `arinar.export`, `arinar.runtime`, ...
if not (Path(__file__).parent / "runtime").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
