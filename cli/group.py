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

#: Subcommands as `--help` lists them: in the order in which one comes to need them. Others follow.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Begin": ("demo", "inspect"),
    "Make a model": ("train", "init"),
    "Deploy it": ("export", "calibrate", "build"),
    "Prove it": ("parity", "bench", "evaluate", "sweep"),
    "Use it": ("generate", "edit", "sample", "serve"),
    "This command": ("completion",),
}


class ArinarGroup(click.Group):
    """Turns our errors into one line and an exit code: 2 for bad input, 1 for a failed check or computation."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        ordered = [name for names in SECTIONS.values() for name in names if name in self.commands]
        return ordered + sorted(set(self.commands) - set(ordered))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By sections; a command's line is its help's first sentence, whole."""
        left = self.list_commands(ctx)
        for section, names in {**SECTIONS, "Other": tuple(left)}.items():
            here = [name for name in names if name in left]
            left = [name for name in left if name not in here]
            if here:
                with formatter.section(section):
                    formatter.write_dl([(name, self.commands[name].get_short_help_str(1000)) for name in here])

    def invoke(self, ctx: click.Context) -> Any:
        with _warnings_in_one_line():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            with sigterm_raises():
                return super().invoke(ctx)
        # click's own way out (--help, Ctrl-C at a prompt; RuntimeErrors); who reads the output has enough of it (| head).
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
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
    """Put ARINAR and MAR models into production, and prove that they are still the same models.

    \b
    See it work:     arinar demo
    Deploy a model:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
                     arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt
                     arinar generate bundle/ --labels 207,360 -o out/
    Serve it:        arinar serve bundle/
    """
