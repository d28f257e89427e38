"""Where the demo checkpoints are: small, really trained, shipped with the package. Plain Python."""

from __future__ import annotations

from pathlib import Path

#: Demo models, by the name that every command accepts in place of a checkpoint's path, and their autoencoders.
DEMO_MODELS: dict[str, str] = {"digits": "digits", "digits-causal": "digits", "digits-mar": "digits"}

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def demo_checkpoint(name: str) -> Path:
    """Path of a demo model's checkpoint. Raises ValueError for a name that is not in ``DEMO_MODELS``."""
    return _WEIGHTS / f"{_known(name)}.safetensors"


def demo_vae(name: str) -> Path:
    """Path of the autoencoder that belongs to the demo model ``name``."""
    return _WEIGHTS / f"{DEMO_MODELS[_known(name)]}-vae.safetensors"


def _known(name: str) -> str:
    if name not in DEMO_MODELS:
        raise ValueError(f"no demo model {name!r}; choose one of {', '.join(DEMO_MODELS)}")
    return name
