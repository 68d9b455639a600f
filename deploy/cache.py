"""A content-addressed store of finished work: what is made of a key's parts is made once.

An entry is a folder `STAGE-DIGEST` with the files that were made and `entry.json`: the key's parts, the result, and
the hash of every file. The digest is the SHA-256 of the parts as canonical JSON.

* Entries are made under another name and renamed, so that they are whole or not there.
* Who makes an entry holds a lock of the kernel's (flock): a second process waits and takes what the first has made. A
  killed process leaves no lock behind; what it left half-made is cleared by the next that writes.
* Every byte is hashed when it is taken. An entry that was damaged is told, deleted and made again.
* A store that cannot be written is read all the same; what could not be kept is told and is no error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from deploy.cache_key import Key, nearest
from deploy.cached_entry import ENTRY_FILE, DamagedError, MissingError, read_entry, read_parts, take_files, write_entry
from deploy.kernel_lock import take
from deploy.progress import Progress
from profiles.errors import GpusqError
from profiles.record import Record

OFF = "off"
_MAKING = ".making"
_LOCKS = 64
_MOST_BYTES = 20 << 30
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
Result = TypeVar("Result")


class Answer(Record):
    """What the cache said about one stage."""

    bundle: str
    stage: str
    hit: bool
    key: str
    why: str

    def to_text(self) -> str:
        """One line for the terminal."""
        return f"{self.stage}: {'hit' if self.hit else 'miss'} {self.key[:12]}, {self.why}"


@dataclass
class Cache:
    """The store in the folder `root`; `Cache(None)` keeps nothing.

    Attributes:
        root: the folder; it is made when something is kept.
        progress: is told what a user should know at once: that another process is waited for, or damage.
        most_bytes: that are kept; what was not used for longest goes first.
        answers: what was asked for so far, in order.
    """

    root: Path | None
    progress: Progress = field(default_factory=Progress)
    most_bytes: int = _MOST_BYTES
    answers: list[Answer] = field(default_factory=list)

    def fetch(self, key: Key, into: Path, make: Callable[[], Result], kind: type[Result], *, bundle: str) -> Result:
        """Return the result of `key`, and have its files in the folder `into`: from the store, or by `make()`.

        Args:
            key: everything that decides about the result.
            into: `make` writes its files here, and here they are copied to; what lay there before is not its own.
            make: does the work.
            kind: of the result, a Record or a dataclass of them.
            bundle: the name of the bundle that the result is for, for the answer.

        Raises:
            GpusqError: what `make` raises; nothing is kept then.
        """
        if self.root is None:
            self._answer(key, bundle, hit=False, why="there is no cache")
            return make()
        reasons: list[str] = []
        result = self._taken(key, into, kind, bundle, reasons)
        if result is not None:
            return result
        with self._locked(key, reasons) as locked:
            if locked and (result := self._taken(key, into, kind, bundle, reasons)) is not None:
                return result
            reasons.append(self._difference(key))
            before = _files(into)
            result = make()
            if locked:
                self._keep(key, into, _files(into) - before, result, reasons)
        self._answer(key, bundle, hit=False, why="; ".join(dict.fromkeys(reasons)))
        return result

    def note(self, key: Key, bundle: str, why: str) -> None:
        """Note that the stage of `key` is done without being looked up, and why."""
        self._answer(key, bundle, hit=False, why=why)

    def _taken(self, key: Key, into: Path, kind: type[Result], bundle: str, reasons: list[str]) -> Result | None:
        """The entry's result, its files copied; None where there is none or it is damaged."""
        place = self._place(key)
        try:
            entry = read_entry(place, key)
            result = TypeAdapter(kind).validate_json(entry.result)
            take_files(place, entry, into)
        except MissingError:
            return None
        except (DamagedError, ValueError) as error:
            said = f"the entry {place.name} was damaged ({error}): it is made again"
            self.progress.found("cache", said)
            reasons.append(said)
            shutil.rmtree(place, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(place)  # so that what is used stays longest
        self._answer(key, bundle, hit=True, why="; ".join([*reasons, "made before of the same parts"]))
        return result

    def _keep(self, key: Key, into: Path, names: set[str], result: object, reasons: list[str]) -> None:
        """Store what was made; a store that cannot take it is told, and is no error."""
        place = self._place(key)
        making = place.with_name(place.name + _MAKING)
        try:
            shutil.rmtree(making, ignore_errors=True)
            text = TypeAdapter(type(result)).dump_json(result, by_alias=True).decode()
            write_entry(making, key, into, sorted(names), text)
            shutil.rmtree(place, ignore_errors=True)
            making.rename(place)
            self._make_room(place)
        except OSError as error:
            shutil.rmtree(making, ignore_errors=True)
            reasons.append(self._not_kept(error))

    def _make_room(self, newest: Path) -> None:
        """Delete the entries that were not used for longest, until the rest fits; never the newest."""
        assert self.root is not None
        places = sorted((path.parent for path in self.root.glob(f"*/{ENTRY_FILE}")), key=_changed, reverse=True)
        kept = _bytes(newest)
        for place in places:
            if place != newest:
                kept += _bytes(place)
                if kept > self.most_bytes:
                    shutil.rmtree(place, ignore_errors=True)

    def _difference(self, key: Key) -> str:
        assert self.root is not None
        places = sorted(self.root.glob(f"{key.stage}-*"), key=_changed, reverse=True)
        known = [parts for place in places if (parts := read_parts(place / ENTRY_FILE)) is not None]
        return nearest(key, known)

    @contextlib.contextmanager
    def _locked(self, key: Key, reasons: list[str]) -> Iterator[bool]:
        """Hold the lock of `key`; yield whether the store can be written."""
        try:
            handle = self._open_lock(int(key.digest[:4], 16) % _LOCKS)
        except OSError as error:
            reasons.append(self._not_kept(error))
            yield False
            return
        try:
            yield self._wait(handle, key, reasons)
        finally:
            os.close(handle)

    def _open_lock(self, number: int) -> int:
        assert self.root is not None
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(locks / f"{number:02}", os.O_RDWR | os.O_CREAT, 0o600)

    def _wait(self, handle: int, key: Key, reasons: list[str]) -> bool:
        def busy() -> None:
            said = f"waited for another gpusq that is at work on the same {key.stage}"
            self.progress.found("cache", said.replace("waited", "waiting"))
            reasons.append(said)

        try:
            take(handle, busy)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            reasons.append(self._not_kept(error))
            return False
        self._clear_half_made()
        return True

    def _clear_half_made(self) -> None:
        """Delete what killed processes left: what is half-made under a lock that nobody holds, or that is held here."""
        assert self.root is not None
        for path in self.root.glob(f"*{_MAKING}"):
            number = int(path.name.rpartition("-")[2][:4], 16) % _LOCKS
            with contextlib.suppress(OSError):
                handle = self._open_lock(number)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(handle)

    def _not_kept(self, error: OSError) -> str:
        said = f"nothing is kept in {self.root}: {(error.strerror or 'it cannot be used').lower()}"
        self.progress.found("cache", said)
        return said

    def _place(self, key: Key) -> Path:
        assert self.root is not None
        return self.root / f"{key.stage}-{key.digest}"

    def _answer(self, key: Key, bundle: str, *, hit: bool, why: str) -> None:
        self.answers.append(Answer(bundle=bundle, stage=key.stage, hit=hit, key=key.digest, why=why))


def cache_root(given: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of the cache: `given`, else GPUSQ_CACHE, else gpusq's folder where XDG has caches.

    Returns:
        The folder, or None where GPUSQ_CACHE is `off`.

    Raises:
        GpusqError: it is a file.
    """
    named = environ.get("GPUSQ_CACHE", "")
    if given is None and named == OFF:
        return None
    xdg = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = given or (Path(named) if named else xdg / "gpusq")
    if root.exists() and not root.is_dir():
        raise GpusqError(f"the cache {root} is a file", hint="give --cache a folder, or use --no-cache")
    return root


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _bytes(place: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return 0
