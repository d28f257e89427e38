"""The `arinar` command itself: the group that subcommands join, and what becomes of their errors."""

from __future__ import annotations

import sys
from typing import Any

import click

from arinar import __version__
from arinar.text import install_hint

# What to install when a package of a room is missing.
INSTALL_HINTS = {
    "torch": "export",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "sklearn": "demo",
    "onnxruntime": "cpu",
}

BAD_INPUT, FAILED = 2, 1


class ArinarGroup(click.Group):
    """Turns our errors into one line and an exit code: 2 for bad input, 1 for a failed check or computation."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
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
        except (RuntimeError, ArithmeticError) as error:
            fail(str(error), FAILED)
        except KeyboardInterrupt:
            fail("interrupted", 130)


def fail(message: str, code: int) -> None:
    click.echo(f"arinar: error: {' '.join(message.split())}", err=True)
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
    """
