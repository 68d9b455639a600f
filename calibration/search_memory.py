"""What a search has found out so far, in a file that grows line by line: a killed search goes on, a repeated one reads.

    FOLDER/3f2a….jsonl     {"units": {"blocks.0.mlp.fc1": 0.011, …}}
                           {"left": ["blocks.0.mlp.fc1"], "samples": 64, "drop": 0.4, "error": 0.0012}

The file's name is the hash of all that the answers depend on, so nothing else ever reads it. A line that was cut short
is left out. Where the folder cannot be written, nothing is remembered, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.output_loss import Loss

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """Where searches are remembered, and what their answers depend on besides the graph: samples, ranges, …"""

    folder: Path
    context: str


@dataclass
class SearchMemory:
    """What one search has found out; `file` None: it is kept in this process alone."""

    file: Path | None
    units: dict[str, float] = field(default_factory=dict)
    _known: dict[tuple[frozenset[str], int], Loss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier search left."""
        with contextlib.suppress(OSError):
            for line in [] if self.file is None else self.file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line))

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "units" in entry:
            self.units = {str(name): float(cost) for name, cost in entry["units"].items()}
        else:
            loss = Loss(float(entry["drop"]), float(entry["error"]))
            self._known[frozenset(entry["left"]), int(entry["samples"])] = loss

    def loss(self, left: Iterable[str], samples: int) -> Loss | None:
        """What is lost with these units left float, on so many samples; None where that is not known."""
        return self._known.get((frozenset(left), samples))

    def keep_units(self, units: Mapping[str, float]) -> None:
        """Remember the units and their costs."""
        self.units = dict(units)
        self._write({"units": self.units})

    def keep(self, left: Iterable[str], samples: int, loss: Loss) -> None:
        """Remember one answer."""
        names = frozenset(left)
        self._known[names, samples] = loss
        self._write({"left": sorted(names), "samples": samples, "drop": loss.drop, "error": loss.error})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(entry)}")  # first the end of a line that a killed process may have cut
        except OSError as error:
            _logger.warning("the search is not remembered: %s", error)
            self.file = None
