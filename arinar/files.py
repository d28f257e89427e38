"""Writing result files: whole or not at all, and what cannot be written is known before the work, not after.

What is being written lies beside its final name under a hidden one, ``.NAME.partial-PROCESS-RANDOM``. A killed process
leaves such litter; whoever checks that it can write there sweeps up what is more than a day old.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Hidden files and folders of ours that nothing has written to for so many seconds belong to nobody any more.
LITTER_AGE = 24 * 3600.0


def check_writable(path: str | os.PathLike[str], *, make_folder: bool = False) -> None:
    """Raise ValueError, naming the reason and the remedy, where a file cannot be written.

    ``make_folder``: the folder it goes into is made where it is missing, rather than asked for.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    if make_folder:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another file") from error
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist; make it, or choose another file")
    sweep(path)
    try:
        _probe(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another file") from error


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError where files cannot be made in a folder, or the folder cannot be made. Makes nothing."""
    folder = Path(folder)
    found = Path(os.path.abspath(folder))
    while not os.path.lexists(found):
        found = found.parent
    try:
        _probe(found)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file in one step, under a temporary name first -> its path. Raises OSError where it cannot be written."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside a file, to write to. That becomes the file at the end; an exception removes it.

    Raises OSError, naming the file, the reason and the remedy, where the disk is full or refuses.
    """
    temporary = hidden_name(path, "partial")
    try:
        yield temporary
        sync(temporary)  # or a power cut could leave the final name with nothing behind it
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to that"
        raise OSError(f"cannot write {path}: {error.strerror or error}; {remedy}, or choose another file") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A new folder in the system's folder for such, removed at the end; what earlier processes left there is swept up."""
    place, owner = Path(tempfile.gettempdir()), getattr(os, "getuid", lambda: 0)()
    folder = place / f"{name}-{os.getpid()}-{secrets.token_hex(4)}"
    with suppress(OSError):
        for entry in place.glob(f"{name}-*-*"):
            # Others' folders are none of our business, and a calibration may take more than a day.
            if entry.lstat().st_uid == owner and not _running(entry.name) and _is_litter(entry):
                remove(entry)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def hidden_name(path: Path, kind: str) -> Path:
    """A name beside ``path`` that no other process or thread has: what ``sweep`` takes for ours."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, all of which is on the disk before, and the name after."""
    sync(source)
    os.rename(source, target)
    _sync_folder(target.parent)


def sync(path: Path) -> None:
    """Have a file, or a folder with all that it holds, on the disk before going on."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        _sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def sweep(path: Path) -> None:
    """Remove what killed processes left beside ``path`` more than a day ago: whatever has a name of ours."""
    ours = re.compile(rf"\.(.+\.(partial|old)-\d+-[0-9a-f]{{8}}|{re.escape(path.name)}\.(partial|old)-.+)")
    with suppress(OSError):  # tidying is no reason to fail
        for entry in path.parent.iterdir():
            if ours.fullmatch(entry.name) and _is_litter(entry):
                remove(entry)


def last_written(path: Path) -> float:
    """When anything in a file or folder was last written, in seconds since 1970. Links are not followed."""
    newest = path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        newest = max([newest, *(last_written(inner) for inner in path.iterdir())])
    return newest


def _is_litter(path: Path) -> bool:
    return time.time() - last_written(path) > LITTER_AGE


def _running(name: str) -> bool:
    """Whether the process that a name of `temporary_folder` holds is another one, and still there."""
    process = int(name.split("-")[-2])
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # there, and another user's
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _probe(folder: Path) -> None:
    """Make a file in a folder, and remove it. Raises OSError."""
    probe = hidden_name(folder / "probe", "partial")
    try:
        probe.touch()
    finally:
        with suppress(OSError):
            probe.unlink()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot open folders, or sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
