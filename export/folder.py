"""How a bundle's folder changes: whole or not at all, one writer at a time.

New graphs come into a folder of their own under ``graphs/``, then the manifest is replaced, then what it no longer names is
removed. The manifest's replacement is the switch: whenever a process dies, the bundle is the old one or the new one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from arinar.files import check_folder, hidden_name, move, remove, sweep, write_text
from arinar.runtime.backends.engines import ENGINES
from arinar.runtime.bundle import MANIFEST_NAME, Bundle, BundleError, Defaults, GraphInfo, Manifest

try:
    import fcntl
except ImportError:  # Windows: two exports into one bundle at once are not told apart there
    fcntl = None  # type: ignore[assignment]

# What a file system says that knows no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle in one step."""
    write_text(folder / MANIFEST_NAME, manifest.to_json())


def write_defaults(out: Path, defaults: Defaults, say: Callable[[str], None]) -> None:
    """Replace what a bundle's images are made with where the caller says nothing. Its graphs and their files stay."""
    with locked(out, say):
        write_manifest(out, replace(Bundle.open(out).manifest, defaults=defaults))


def check_bundle_folder(out: Path) -> None:
    """Raise BundleError where a bundle cannot be written, or added to: before anything long begins."""
    try:
        check_folder(out)
        check_folder(out.resolve().parent)
    except ValueError as error:
        raise BundleError(str(error)) from error


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` (same file system, so that it can be renamed), removed whatever happens."""
    out = out.resolve()  # what lies beside a link to a bundle may be another disk
    made = hidden_name(out, "partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror or error}; choose another folder") from error
    sweep(out)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only process (and thread) that changes the bundle ``out``; whoever comes later waits, and says so.

    The lock lies beside the bundle, which need not be there yet; a killed process holds none. Where the system or the
    file system has no locks, does without.
    """
    out = out.resolve()
    path = out.with_name(f".{out.name}.lock")
    handle = None if fcntl is None else _acquire(path, out, say)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _acquire(path: Path, out: Path, say: Callable[[str], None]) -> int | None:
    """The locked file, open; None where there are no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another command is changing {out}; waiting for it to end")
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever held it before has removed the file: a lock on what has no name keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                path.unlink(missing_ok=True)
                return None
            raise
        os.close(handle)


def place(made: Path, out: Path, manifest: Manifest, add: bool) -> Manifest:
    """Put a precision's graphs, made in the folder ``made``, into the bundle ``out`` -> its new manifest. Under the lock.

    ``manifest`` describes that precision alone, its files in ``graphs/<precision>/``. ``add``: to what the bundle holds;
    otherwise that is replaced, or the bundle is new.
    """
    out = out.resolve()
    (precision,) = manifest.graphs
    if not (out / MANIFEST_NAME).is_file():
        return _place_new(made, out, manifest)
    old = Bundle.open(out)
    remove_unnamed(old)  # of a writer that was killed
    if add and _holds(old, manifest):
        name = None
    else:
        name = _free_name(out / "graphs", precision, taken=precision in old.manifest.graphs)
        manifest = _moved(manifest, f"graphs/{precision}/", f"graphs/{name}/")
    changed = merge(old.manifest, manifest) if add else manifest
    if name is not None:
        (out / "graphs").mkdir(exist_ok=True)
        move(made, out / "graphs" / name)
    write_manifest(out, changed)
    remove_unnamed(Bundle(out, changed))
    if not add:
        remove(out / ENGINES)  # of the model that was replaced
    return changed


def _place_new(made: Path, out: Path, manifest: Manifest) -> Manifest:
    """A bundle appears under its name, whole."""
    (precision,) = manifest.graphs
    with scratch_folder(out) as scratch:
        (scratch / "graphs").mkdir()
        os.rename(made, scratch / "graphs" / precision)
        write_manifest(scratch, manifest)
        if out.exists():
            out.rmdir()  # empty, or it would not be a new one
        move(scratch, out)
    return manifest


def _holds(bundle: Bundle, new: Manifest) -> bool:
    """Whether a bundle has the very files of a precision already, undamaged, under the same names."""
    if any(bundle.manifest.files.get(name) != info for name, info in new.files.items()):
        return False
    try:
        bundle.verify(list(new.files))
    except BundleError:
        return False
    return True


def _free_name(folder: Path, precision: str, taken: bool) -> str:
    """A folder's name for a precision's graphs: its own, or where the bundle has such graphs one that never was there.

    (Readers of the old manifest then find a file missing, never another one under its name.)
    """
    name = f"{precision}-{secrets.token_hex(4)}" if taken else precision
    while (folder / name).exists():
        name = f"{precision}-{secrets.token_hex(4)}"
    return name


def _moved(manifest: Manifest, old: str, new: str) -> Manifest:
    """A manifest whose files lie in another folder: ``new`` at the beginning of names in place of ``old``."""

    def name(file: str) -> str:
        return new + file.removeprefix(old) if file.startswith(old) else file

    def graph(info: GraphInfo) -> GraphInfo:
        cpu, cuda = (file and name(file) for file in (info.cpu_file, info.cuda_file))
        return replace(info, file=name(info.file), cpu_file=cpu, cuda_file=cuda, weights=tuple(map(name, info.weights)))

    return replace(
        manifest,
        graphs={precision: {key: graph(info) for key, info in infos.items()} for precision, infos in manifest.graphs.items()},
        files={name(file): info for file, info in manifest.files.items()},
    )


def remove_unnamed(bundle: Bundle) -> None:
    """Remove the folders in ``graphs/`` of which the manifest names no file."""
    folder = bundle.folder / "graphs"
    if folder.is_symlink() or not folder.is_dir():
        return
    named = {name.split("/")[1] for name in bundle.manifest.files if name.startswith("graphs/")}
    for entry in folder.iterdir():
        if entry.name not in named:
            remove(entry)


def merge(old: Manifest, new: Manifest) -> Manifest:
    """A bundle's manifest with one precision added or replaced."""
    (precision,) = new.graphs
    replaced = old.graphs.get(precision, {})
    graphs = {p: dict(g) for p, g in old.graphs.items() if p != precision} | new.graphs
    # Precisions share graphs with fp32 alone; those that share one of the replaced go on sharing it.
    for others in graphs.values() if precision == "fp32" else ():
        for name, info in others.items():
            if info == replaced.get(name):
                others[name] = new.graphs[precision][name]
    quantization = {name: value for name, value in old.provenance.get("quantization", {}).items() if name != precision}
    quantization |= new.provenance.get("quantization", {})
    folders = {file.rpartition("/")[0] for infos in graphs.values() for info in infos.values() for file in info.files}
    return replace(
        new,
        graphs=graphs,
        files={name: info for name, info in (old.files | new.files).items() if name.rpartition("/")[0] in folders},
        schemes={name: scheme for name, scheme in old.schemes.items() if name != precision} | new.schemes,
        provenance=old.provenance | new.provenance | {"quantization": quantization},
    )
