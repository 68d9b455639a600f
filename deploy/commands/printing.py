"""How a command tells its result: on stdout, as text or as JSON. Progress goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deploy.cache import Cache
    from deploy.progress import Progress
    from profiles.record import Record

GATE_MISSED = 3  # the exit code


def progress() -> Progress:
    """Lines and bars where stderr is a terminal, else nothing."""
    from deploy.progress import Progress, TerminalProgress

    return TerminalProgress() if sys.stderr.isatty() else Progress()


def tell(result: Record, as_json: bool, to_text: Callable[[], str]) -> None:
    """Print a result as JSON, or the text that is made of it."""
    click.echo((result.to_json() if as_json else to_text()).rstrip("\n"))


def tell_answers(cache: Cache) -> None:
    """Say what the cache answered, on stderr: the result is the bundle."""
    for answer in cache.answers:
        click.echo(f"{answer.bundle}: {answer.to_text()}", err=True)
