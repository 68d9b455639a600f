"""Fill in what a device's file only names: its architecture and its runtimes, and what follows from them."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from profiles.architecture import load_architectures
from profiles.errors import GpusqError
from profiles.record import Record
from profiles.runtime_line import load_runtime_lines
from profiles.toml_file import Fields


def with_shared(fields: Fields, path: Path) -> Fields:
    """Return `fields` of the device file `path` with the entries that they name; what they say themselves wins.

    Raises:
        GpusqError: there is no architecture or no runtime of that name.
    """
    return {**_of_architecture(fields, path), **_of_runtimes(fields, path), **fields, **_entries(fields)}


def one_of(known: Collection[str], name: str, complaint: str, *, hint: str = "") -> str:
    """Return `name` if it is known.

    Raises:
        GpusqError: it is not: `complaint 'name'`, with the nearest that is known, and all of them if there is no hint.
    """
    if name not in known:
        near = difflib.get_close_matches(name.casefold(), known, n=1)
        suggestion = f" (did you mean '{near[0]}'?)" if near else ""
        raise GpusqError(f"{complaint} '{name}'{suggestion}", hint=hint or f"there are {', '.join(known)}")
    return name


def _of_architecture(fields: Fields, path: Path) -> Fields:
    if not isinstance(name := fields.get("architecture"), str):
        return {}
    known = load_architectures()
    found = known.architectures[one_of(known.architectures, name, f"{path}: architecture: there is no")]
    return {
        "compute_capability": found.compute_capability,
        "ahead_of_time": _dumped(found.ahead_of_time),
        "sparse": _dumped(known.sparse_kernels if found.sparse_types else None),
    }


def _of_runtimes(fields: Fields, path: Path) -> Fields:
    names = _named_runtimes(fields)
    known = load_runtime_lines()
    lines = [known[one_of(known, name, f"{path}: runtimes: there is no")] for name in names]
    if not lines:
        return {}
    return {"runtime": lines[0].runtime, "runtime_version": lines[0].version, "onnx": _dumped(lines[0].onnx)}


def _entries(fields: Fields) -> Fields:
    """The entries themselves, in the place of their names."""
    entries: Fields = {}
    if isinstance(name := fields.get("architecture"), str):
        entries["architecture"] = _dumped(load_architectures().architectures[name])
    if names := _named_runtimes(fields):
        entries["runtimes"] = [_dumped(load_runtime_lines()[each]) for each in names]
    return entries


def _named_runtimes(fields: Fields) -> list[str]:
    names = fields.get("runtimes")
    return [each for each in names if isinstance(each, str)] if isinstance(names, list) else []


def _dumped(record: Record | None) -> Fields | None:
    return None if record is None else record.model_dump(mode="json")
