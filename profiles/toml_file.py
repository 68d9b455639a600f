"""Read a TOML file into a strict record; whatever does not fit is an error that names the file and the key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from profiles.errors import GpusqError
from profiles.record import Record, first_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Fields = dict[str, Any]
AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_toml(path: Path) -> Fields:
    """Return what the TOML file `path` holds.

    Raises:
        GpusqError: there is no such file, or it is no TOML.
    """
    if not path.is_file():
        raise GpusqError(f"no such file: {path}", hint="give the path of a device profile in TOML, or a profile's name")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GpusqError(f"{path} is not TOML: {error}", hint="compare it with `gpusq profiles a100 --json`") from None


def fit(kind: type[AnyRecord], fields: Fields, path: Path) -> AnyRecord:
    """Return the record that `fields`, read from `path`, make.

    Raises:
        GpusqError: a key is unknown, missing or of another type.
    """
    try:
        return kind.model_validate_json(json.dumps(fields, default=str), strict=True)
    except ValidationError as error:
        described = f"{kind.__module__.replace('.', '/')}.py"
        raise GpusqError(f"{path}: {first_problem(error)}", hint=f"{described} describes each key") from None
