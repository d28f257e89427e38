"""Tracing the same module twice in one test run takes the first trace again: most of the suite's time was that.

Two modules are the same where their pickles are: class, every attribute, every weight. What cannot be pickled, a class of
a test function for instance, is traced. Writing, naming, checking and validating a graph is done every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from once import once


class _Pickler(pickle.Pickler):
    """Tensors by their content; the same tensor again, as the same."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.seen: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, torch.Tensor):
            data = obj.detach().contiguous().numpy().tobytes()
            number = self.seen.setdefault(id(obj), len(self.seen))
            kind = type(obj).__name__, str(obj.dtype), tuple(obj.shape), obj.requires_grad
            return number, *kind, hashlib.sha256(data).hexdigest()
        return None


def fingerprint(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Of everything that a trace depends on; None where that cannot be told."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump((module, args))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    settings = repr(sorted((name, repr(value)) for name, value in options.items()))
    return hashlib.sha256(file.getvalue() + settings.encode()).hexdigest()[:32]


class _Trace:
    """What the exporter returns, as far as arinar uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, path: Path, external_data: bool) -> None:
        assert external_data and path.name == "raw.onnx"  # the name by which the graph finds its weights
        for file in self.folder.iterdir():
            shutil.copyfile(file, path.parent / file.name)


@contextlib.contextmanager
def kept_traces(folder: Path) -> Iterator[Callable[..., Any]]:
    """Within, `torch.onnx.export` keeps traces in ``folder``, which the worker processes share; gives the real one."""
    trace = torch.onnx.export
    folder.mkdir(exist_ok=True)
    # PyTorch's record of a trace, which nobody reads: pytest would render and keep every line of it.
    logging.getLogger("torch.__trace").propagate = False

    def export(module: torch.nn.Module, args: tuple[Any, ...], *others: Any, **options: Any) -> Any:
        key = None if others else fingerprint(module, args, options)
        if key is None:
            return trace(module, args, *others, **options)
        done = folder / key

        def make() -> None:
            program = trace(module, args, **options)
            assert program is not None
            scratch = folder / f".{key}.{os.getpid()}"
            scratch.mkdir()
            program.save(scratch / "raw.onnx", external_data=True)
            scratch.rename(done)

        once(done, make)
        return _Trace(done)

    torch.onnx.export = export  # type: ignore[assignment]
    try:
        yield trace
    finally:
        torch.onnx.export = trace
