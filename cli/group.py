"""The `arinar` command itself: the group that subcommands join, and what becomes of their errors."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from arinar import __version__
from arinar.text import install_hint, printable

# What to install when a package of a room is missing.
INSTALL_HINTS = {
    "torch": "export",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "sklearn": "demo",
    "onnxruntime": "cpu",
    "ray": "ray",
    **dict.fromkeys(
        ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "multipart", "python_multipart"), "serve"
    ),
}

BAD_INPUT, FAILED = 2, 1


class ArinarGroup(click.Group):
    """Turns our errors into one line and an exit code: 2 for bad input, 1 for a failed check or computation."""

    def invoke(self, ctx: click.Context) -> Any:
        with _warnings_in_one_line():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            with sigterm_raises():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # click's own way out (--help, Ctrl-C at a prompt); RuntimeErrors
            raise
        except ModuleNotFoundError as error:
            extra = INSTALL_HINTS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            fail(f"this command needs the package {error.name!r}: {install_hint(extra)} installs it", BAD_INPUT)
        except (ValueError, OSError, ImportError) as error:
            fail(str(error), BAD_INPUT)
        except RecursionError:
            fail("a file is nested too deeply to be read; expected one that arinar, or PyTorch, wrote", BAD_INPUT)
        except (RuntimeError, ArithmeticError) as error:
            fail(str(error), FAILED)
        except Terminated:
            fail("terminated", 143)
        except KeyboardInterrupt:
            fail("interrupted", 130)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings speak of files too: they are told as errors are, without the place in the code."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"arinar: warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever cleans up on Ctrl-C cleans up."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While inside, the first SIGTERM raises Terminated; a second ends the process at once."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    # Only the main thread may install handlers; who ignores the signal, or has a handler, keeps it so.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fail(message: str, code: int) -> None:
    click.echo(f"arinar: error: {printable(message)}", err=True)
    sys.exit(code)


@click.group(cls=ArinarGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="arinar")
def main() -> None:
    """Put ARINAR models into production: train, export, generate, and prove that it is still the same model.

    \b
    See it work:     arinar demo
    Deploy a model:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
                     arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt
                     arinar generate bundle/ --labels 207,360 -o out/
    Serve it:        arinar serve bundle/
    """
