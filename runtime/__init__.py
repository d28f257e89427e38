"""Generate images from a bundle: no PyTorch, no ONNX package, only NumPy, Pillow and an execution backend.

>>> from arinar.runtime import Pipeline
>>> out = Pipeline.load("bundle/").generate([3, 7], seed=0)  # doctest: +SKIP
>>> out.images[0].save("three.png")  # doctest: +SKIP
"""

from .bundle import Bundle, BundleError, Manifest
from .known import Known
from .noise import Noise
from .pipeline import Generation, GenerationCancelled, Pipeline, Progress

__all__ = ["Bundle", "BundleError", "Generation", "GenerationCancelled", "Known", "Manifest", "Noise", "Pipeline", "Progress"]
