"""What a run that is interrupted leaves behind for the next one: a file that is replaced whole, or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from calibration.histogram import Histogram

_logger = logging.getLogger(__name__)


@dataclass
class Resume:
    """The state of a collection in a file.

    Attributes:
        file: where it is kept until the collection is complete.
        samples_sha256: what the samples are known by.
        every_s: how often it is written, in seconds.
    """

    file: Path
    samples_sha256: str
    every_s: float = 10.0
    _written: float = field(default=0.0, init=False)

    def load(self, key: str, histograms: Mapping[str, Histogram]) -> int:
        """Fill `histograms` with what an earlier run with the same key counted; return how many batches that were."""
        self._written = time.monotonic()
        try:
            with self.file.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                if str(kept["key"]) != key:
                    _logger.info("%s is of another calibration: it starts anew", self.file)
                    return 0
                counts, bits, done = kept["counts"], kept["bits"].tolist(), int(kept["done"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            _logger.warning("%s cannot be read: the calibration starts anew", self.file)
            return 0
        for histogram, own_counts, own_bits in zip(histograms.values(), counts, bits, strict=True):
            histogram.counts, histogram.bits = own_counts, own_bits
        return done

    def save(self, key: str, histograms: Mapping[str, Histogram], done: int) -> None:
        """Keep what was counted in the first `done` batches, if the last time is long enough ago."""
        if time.monotonic() - self._written < self.every_s:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f"{self.file.name}.new")
        with new.open("wb") as file:
            np.savez(
                file,
                key=np.array(key),
                done=np.array(done),
                counts=np.stack([histogram.counts for histogram in histograms.values()]),
                bits=np.array([histogram.bits for histogram in histograms.values()], np.int64),
            )
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file)
        self._written = time.monotonic()

    def remove(self) -> None:
        """The collection is complete: nothing stays."""
        for file in (self.file, self.file.with_name(f"{self.file.name}.new")):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
