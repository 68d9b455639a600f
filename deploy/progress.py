"""What a command says while it works: one line a stage, a bar for whatever takes long; nothing unless asked.

`Progress` is silent and is what the Python API uses. `TerminalProgress` writes to stderr; the command line uses it
where that is a terminal.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

Advance = Callable[[float], None]
_SHOWN = 5

_log = logging.getLogger(__name__)


class Progress:
    """Says nothing."""

    def found(self, stage: str, text: str) -> None:
        """Report what a stage found."""

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[Advance]:
        """Show a bar while the block runs; call what is yielded with the share that is done, if it is known."""
        yield lambda share: None


def tell_all(progress: Progress, stage: str, notes: Sequence[str]) -> None:
    """Report the first of `notes` and count the rest, which the log has: a large model has one for each layer."""
    for note in notes[:_SHOWN]:
        progress.found(stage, note)
    if rest := notes[_SHOWN:]:
        progress.found(stage, f"and {len(rest)} more: all are in the report, and here with -v")
    for note in rest:
        _log.info("%s: %s", stage, note)


class TerminalProgress(Progress):
    """Writes to the terminal behind stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def found(self, stage: str, text: str) -> None:
        """Print one line."""
        self._console.print(f"[bold]{stage:<12}[/bold] {_escaped(text)}")

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[Advance]:
        """Show a bar that goes away when the block ends."""
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bars(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(_escaped(label), total=None)
            yield lambda share: bars.update(task, total=1.0, completed=share)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
