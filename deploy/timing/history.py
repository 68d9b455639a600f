"""The history of results: one SQLite file, by default `gpusq.db` in the working folder.

    run      one result of bench: the record as JSON, and what it is looked up by
    engine   the engines of a run, by the SHA-256 of their model
    samples  every sample of an engine, float64 little-endian, deflated

A run is written in one transaction, in WAL mode: a process that is killed leaves the runs before it, whole. A file of a
newer release, a damaged one, and one that is no history are refused before anything is written to them.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from deploy.timing.results import BenchResult
from profiles.errors import GpusqError
from profiles.record import first_problem

DEFAULT = Path("gpusq.db")
SCHEMA = 1
APPLICATION = 0x67707571  # "gpuq", SQLite's application_id
_WAIT_S = 30.0
_TABLES = """
CREATE TABLE run (
    id TEXT PRIMARY KEY, created TEXT NOT NULL, device TEXT NOT NULL, batch INTEGER NOT NULL,
    usable INTEGER NOT NULL, result TEXT NOT NULL);
CREATE TABLE engine (
    run TEXT NOT NULL REFERENCES run (id), position INTEGER NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (run, position)) WITHOUT ROWID;
CREATE INDEX engine_by_model ON engine (sha256);
CREATE TABLE samples (
    run TEXT NOT NULL REFERENCES run (id), position INTEGER NOT NULL, quantity TEXT NOT NULL, deflated BLOB NOT NULL,
    PRIMARY KEY (run, position, quantity)) WITHOUT ROWID;
"""

Array = npt.NDArray[np.float64]
Raw = Sequence[Mapping[str, Array]]


class History:
    """An open history."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def add(self, result: BenchResult, raw: Raw) -> None:
        """Store a result whole or not at all, with its engines' samples by quantity, such as `latency_ms` [samples]."""
        with self._connection as db:
            db.execute(
                "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?)",
                (
                    result.id,
                    result.created,
                    result.device,
                    result.batch,
                    result.usable,
                    result.model_dump_json(by_alias=True),
                ),
            )
            for position, (engine, samples) in enumerate(zip(result.engines, raw, strict=True)):
                db.execute("INSERT INTO engine VALUES (?, ?, ?, ?)", (result.id, position, engine.name, engine.sha256))
                db.executemany(
                    "INSERT INTO samples VALUES (?, ?, ?, ?)",
                    [(result.id, position, quantity, _deflated(values)) for quantity, values in samples.items()],
                )

    def results(
        self, *, model: str | None = None, device: str | None = None, usable: bool = False, last: int | None = None
    ) -> list[BenchResult]:
        """The results, the oldest first.

        Args:
            model: only those that hold this model, by its SHA-256 or its name.
            device: only those of this device.
            usable: only those that broke no condition.
            last: only so many of the newest.
        """
        rows = self._connection.execute(
            "SELECT result FROM run WHERE (:device IS NULL OR device = :device) AND (NOT :usable OR usable) "
            "AND (:model IS NULL OR EXISTS (SELECT 1 FROM engine WHERE engine.run = run.id "
            "AND :model IN (engine.sha256, engine.name))) ORDER BY created DESC, rowid DESC LIMIT :last",
            {"model": model, "device": device, "usable": usable, "last": -1 if last is None else last},
        )
        return [self._parsed(text) for (text,) in rows][::-1]

    def samples(self, run: str, position: int, quantity: str) -> Array:
        """The samples of the engine at `position` of a run, [samples], in the order in which they were taken."""
        row = self._connection.execute(
            "SELECT deflated FROM samples WHERE run = ? AND position = ? AND quantity = ?", (run, position, quantity)
        ).fetchone()
        if row is None:
            raise GpusqError(f"{self._path} holds no {quantity} of run {run}", hint="bench the model again")
        return np.frombuffer(zlib.decompress(row[0]), "<f8")

    def _parsed(self, text: str) -> BenchResult:
        try:
            return BenchResult.model_validate_json(text)
        except ValidationError as error:
            raise GpusqError(f"{self._path}: {first_problem(error)}", hint="it was edited: start a new one") from None


@contextlib.contextmanager
def open_history(path: Path, *, create: bool = False) -> Iterator[History]:
    """Open the history in `path` while the block runs.

    Args:
        path: the file.
        create: whether to make it where it is missing; else it is opened for reading alone.

    Raises:
        GpusqError: there is none, or it is damaged, of a newer release, or something else.
    """
    new = not path.exists() or path.stat().st_size == 0
    if new and not create:
        raise GpusqError(f"no history in {path}", hint="`gpusq bench MODEL` writes one; --db names another file")
    if not new:
        _check(path)
    with contextlib.closing(_connect(path, "rwc" if create else "ro")) as connection, _faults(path):
        if new:
            _create(connection)
        yield History(connection, path)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT_S)
    except sqlite3.OperationalError as error:
        raise GpusqError(f"{path} cannot be opened: {error}", hint="check the folder and its rights") from None


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(
        f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; {_TABLES} COMMIT;"
    )


def _check(path: Path) -> None:
    """Refuse what is not a whole history of this release, without writing."""
    with contextlib.closing(_connect(path, "ro")) as connection, _faults(path):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise GpusqError(f"{path} is a database of another program", hint="give another file with --db")
        if version > SCHEMA:
            raise GpusqError(f"{path} has schema {version}, this gpusq reads {SCHEMA}", hint="update gpusq")
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise GpusqError(f"{path} is damaged: {state.splitlines()[-1]}", hint=_RESCUE)


_RESCUE = "keep it for `sqlite3 FILE .recover`, and give another file with --db"


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        busy = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
        hint = "another process writes to it: try again" if busy else _RESCUE
        raise GpusqError(f"{path} cannot be used: {error}", hint=hint) from None


def _deflated(values: Array) -> bytes:
    return zlib.compress(values.astype("<f8").tobytes(), level=6)
