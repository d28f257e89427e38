"""Statistics of a data set's latents, as training codes write them: a file with ``mean`` and ``std``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from .checkpoint_files import CheckpointError, open_checkpoint

# Two rows of numbers, one per channel: what is larger is something else, or a bomb.
_MOST_BYTES = 1 << 20


def read_latent_stats(path: Path, channels: int) -> dict[str, float | tuple[float, ...]]:
    """``latent_shift`` and ``latent_scale`` from ``latents_stats.pt``, ``.npz`` or ``.safetensors``.

    The file holds ``mean`` and ``std``, each one value or ``channels`` of them, in any shape ((1, C, 1, 1), say); the
    model works on (latent - mean) / std. Raises CheckpointError (a ValueError) for anything else.
    """
    arrays = _arrays(path)
    missing = [name for name in ("mean", "std") if name not in arrays]
    if missing:
        held = ", ".join(sorted(arrays)[:6]) or "nothing"
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)} (it holds {held}); expected mean and std of the latents"
        )
    values = {}
    for name in ("mean", "std"):
        flat = arrays[name].flatten()
        if flat.size not in (1, channels):
            raise CheckpointError(
                f"{path}: {name} has {flat.size} values; expected 1, or {channels} (one per latent channel of the model)"
            )
        if not np.isfinite(flat).all() or (name == "std" and not (flat > 0).all()):
            wanted = "numbers above 0" if name == "std" else "finite numbers"
            raise CheckpointError(f"{path}: {name} has values that are not {wanted}: use statistics of whole latents")
        values[name] = flat
    return {"latent_shift": _plain(values["mean"]), "latent_scale": _plain(1 / values["std"])}


def _plain(values: np.ndarray) -> float | tuple[float, ...]:
    return float(values[0]) if values.size == 1 else tuple(float(value) for value in values)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file, float64; never runs code from it."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; expected statistics of latents: mean and std alone"
            )
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if any(member.filename.endswith(".npy") for member in members):
                return _read_npz(path, members)
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}: give the statistics of the latents (latents_stats.pt or .npz)") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    state = open_checkpoint(path).states.get("", {})
    return {
        str(name): value.detach().double().numpy()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() <= _MOST_BYTES
    }


def _read_npz(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, np.ndarray]:
    if sum(member.file_size for member in members) > _MOST_BYTES:
        raise CheckpointError(f"{path} unpacks to more than {_MOST_BYTES:,} bytes; expected mean and std alone")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
    except (ValueError, TypeError, OSError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged, or holds more than numbers ({error}): write it with numpy.savez") from None
