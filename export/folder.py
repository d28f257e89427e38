"""How a bundle's folder is replaced: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from arinar.files import write_text
from arinar.runtime.bundle import MANIFEST_NAME, BundleError, Manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle in one step."""
    write_text(folder / MANIFEST_NAME, manifest.to_json())


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` (same file system, so that it can be renamed), removed whatever happens."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror or error}; choose another folder") from error
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what stood there is moved aside first and removed after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, aside / "old")
        os.rename(source, target)
        shutil.rmtree(aside)
    else:
        os.rename(source, target)


def merge(old: Manifest, new: Manifest) -> Manifest:
    """A bundle's manifest with one precision added or replaced."""
    (precision,) = new.graphs
    prefix = f"graphs/{precision}/"
    kept = {name: info for name, info in old.files.items() if not name.startswith(prefix)}
    graphs = {p: dict(g) for p, g in old.graphs.items() if p != precision} | new.graphs
    # Other precisions that share a graph of the one that was replaced go on sharing it.
    for others in graphs.values():
        for name, info in others.items():
            if info.file.startswith(prefix):
                others[name] = new.graphs[precision][name]
    # (What the new provenance says of it, it says of all that it knows.)
    quantization = {name: value for name, value in old.provenance.get("quantization", {}).items() if name != precision}
    return replace(
        new,
        graphs=graphs,
        files=kept | new.files,
        schemes={name: scheme for name, scheme in old.schemes.items() if name != precision} | new.schemes,
        provenance=old.provenance | {"quantization": quantization} | new.provenance,
    )
