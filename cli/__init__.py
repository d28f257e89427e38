"""The `arinar` command: thin mirrors of functions. A room is imported only inside the subcommand that needs it.

One file for each subject; importing it adds its subcommands to the group.
"""

from . import bundles, editing, images, inspection, many, measuring, models, serving, shells
from .group import main

__all__ = ["bundles", "editing", "images", "inspection", "main", "many", "measuring", "models", "serving", "shells"]
