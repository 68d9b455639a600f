"""Options that belong together reach a command as one value.

options --samples, --seed, ...     ->     source=SampleSource(...)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

Command = Callable[..., None]
Decorator = Callable[[Any], Any]


def gathered(into: str, make: Callable[..., Any], *options: Decorator) -> Callable[[Command], Command]:
    """A decorator that gives a command `options`, and to its function what `make` makes of their values, as `into`."""
    names = inspect.signature(make).parameters

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**{into: make(**{name: given.pop(name) for name in names})}, **given)

        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)

    return decorate
