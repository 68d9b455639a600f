"""Write the reference of the command line in Markdown, from the commands' own help: `python -m deploy.reference`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from deploy.cli import main

_WIDTH = 100


def reference() -> str:
    """The reference as Markdown: one section a command."""
    return "\n".join(["# The command line", "", *_sections(main, "gpusq")]) + "\n"


def _sections(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(
        command, info_name=path, max_content_width=_WIDTH, terminal_width=_WIDTH, **main.context_settings
    )
    yield f"## {path}"
    yield ""
    yield "```text"
    yield command.get_help(context)
    yield "```"
    yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _sections(child, f"{path} {name}")


if __name__ == "__main__":
    click.echo(reference(), nl=False)
