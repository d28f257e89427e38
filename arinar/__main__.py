"""`python -m arinar` is the `arinar` command."""

from .cli import main

main(prog_name="arinar")
