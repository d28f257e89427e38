"""The subcommand that lets a shell complete the others."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .group import main


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes this command.

    \b
    Example:  arinar completion bash > ~/.arinar-complete.bash && echo "source ~/.arinar-complete.bash" >> ~/.bashrc
              arinar completion zsh > ~/.arinar-complete.zsh && echo "source ~/.arinar-complete.zsh" >> ~/.zshrc
              arinar completion fish > ~/.config/fish/completions/arinar.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    click.echo(kind(main, {}, "arinar", "_ARINAR_COMPLETE").source())
