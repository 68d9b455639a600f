"""The key of cached work: named parts, each plain data, and their digest.

    Key("build", {"model": "9f86d0…", "device": {"compute_capability": "8.0"}, "versions": {"tensorrt-rtx": "1.7.1"}})

Two keys differ in the parts that they name differently, down to the innermost: `versions.tensorrt-rtx`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CODE = ("calibration", "deploy", "exporters", "profiles", "students")
_SHOWN = 4
_LONG = 40
_HASH = 64

Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """What decides about the result of a stage.

    Attributes:
        stage: its name, such as `build`; letters only.
        parts: by name, what JSON can hold; their order does not matter.
    """

    stage: str
    parts: Parts

    @property
    def canonical(self) -> str:
        """The parts as JSON with sorted keys and no spaces."""
        return json.dumps(self.parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the stage and the canonical parts, in hexadecimal."""
        return hashlib.sha256(f"{self.stage}\n{self.canonical}".encode()).hexdigest()


def differences(before: Parts, now: Parts) -> dict[str, tuple[str, str]]:
    """What is different in two keys' parts: the innermost name, joined by dots, with both values in short."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return {
        name: (old.get(name, "none"), new.get(name, "none"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def nearest(key: Key, known: Iterable[Parts]) -> str:
    """Say in which parts `key` differs from the one of `known` that is most like it; the first of equals counts."""
    found = [differences(parts, key.parts) for parts in known]
    if not found:
        return f"no {key.stage} is in the cache"
    fewest = min(found, key=len)
    told = [f"{name}: {_short(old)} → {_short(new)}" for name, (old, new) in fewest.items()]
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return f"the nearest entry differs in {', '.join(told[:_SHOWN])}{more}"


@functools.cache
def code_digest() -> str:
    """SHA-256 of gpusq's own Python files, by their paths: a change to the code may change any result."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _leaves(parts: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Every innermost value under its name; an empty list or object is one."""
    inner = (
        parts.items() if isinstance(parts, Mapping) else enumerate(parts) if isinstance(parts, (list, tuple)) else ()
    )
    if not isinstance(parts, (Mapping, list, tuple)) or not parts:
        yield name, json.dumps(parts, sort_keys=True, ensure_ascii=False)
    for key, value in inner:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _short(text: str) -> str:
    text = text.strip('"')
    is_hash = len(text) == _HASH and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_hash else f"{text[: _LONG - 1]}…" if len(text) > _LONG else text
