"""The `arinar` command: thin mirrors of functions. A room is imported only inside the subcommand that needs it."""

from .command import main

__all__ = ["main"]
