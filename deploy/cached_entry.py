"""One entry of the cache on the disk: `entry.json` and the files beside it, each checked by its hash."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.bundle import hash_file
from deploy.cache_key import Key, Parts
from deploy.manifest import FileEntry
from profiles.record import Record

ENTRY_FILE = "entry.json"
_FILES = "files"
_PIECE = 1 << 20


class DamagedError(Exception):
    """An entry is not what was stored."""


class MissingError(Exception):
    """There is no such entry."""


class Entry(Record):
    """What `entry.json` holds; `seal` is the SHA-256 of the other fields."""

    stage: str
    parts: dict[str, Any]
    result: str
    files: dict[str, FileEntry]
    seal: str = ""

    def sealed(self) -> Entry:
        """The same with its seal."""
        fields = self.model_dump(mode="json", exclude={"seal"})
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return self.model_copy(update={"seal": hashlib.sha256(text.encode()).hexdigest()})


def write_entry(place: Path, key: Key, source: Path, names: list[str], result: str) -> None:
    """Make the folder `place` of copies of the files `names` in `source`, and of `result`, which is JSON."""
    files = {}
    (place / _FILES).mkdir(parents=True, mode=0o700)
    for name in names:
        copy = place / _FILES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        files[name] = hash_file(source / name)
    entry = Entry(stage=key.stage, parts=json.loads(key.canonical), result=result, files=files).sealed()
    (place / ENTRY_FILE).write_text(entry.model_dump_json(), encoding="utf-8")


def read_entry(place: Path, key: Key) -> Entry:
    """Read the entry of `key` in the folder `place`, without its files.

    Raises:
        MissingError: there is none.
        DamagedError: it is not what was stored.
    """
    try:
        entry = parsed(place / ENTRY_FILE)
    except FileNotFoundError:
        raise MissingError(place.name) from None
    if Key(entry.stage, entry.parts).digest != key.digest:
        raise DamagedError(f"{ENTRY_FILE} is of another key")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entry.files):
        raise DamagedError(f"{ENTRY_FILE} names a file elsewhere")
    return entry


def read_parts(path: Path) -> Parts | None:
    """The parts of the key in the `entry.json` at `path`; None where it is damaged or gone."""
    try:
        return parsed(path).parts
    except (OSError, DamagedError):
        return None


def take_files(place: Path, entry: Entry, into: Path) -> None:
    """Copy the files of `entry` to the folder `into`, or none of them.

    Raises:
        DamagedError: one of them is missing or not what was stored.
    """
    taken: list[Path] = []
    try:
        for name, known in entry.files.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            taken.append(target)
            if _copied(place / _FILES / name, target) != known:
                raise DamagedError(f"{name} has another hash")
    except BaseException:
        for path in taken:
            path.unlink(missing_ok=True)
        raise


def _copied(source: Path, target: Path) -> FileEntry:
    """Copy a file; return size and hash of what was written."""
    digest, size = hashlib.sha256(), 0
    if not source.is_file():
        raise DamagedError(f"{source.name} is missing")
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE):
            writer.write(piece)
            digest.update(piece)
            size += len(piece)
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def parsed(path: Path) -> Entry:
    """Read the `entry.json` at `path`.

    Raises:
        DamagedError: it is not what was stored.
    """
    try:
        entry = Entry.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DamagedError(f"{ENTRY_FILE} cannot be read") from None
    if entry.sealed().seal != entry.seal:
        raise DamagedError(f"{ENTRY_FILE} has another hash")
    return entry
