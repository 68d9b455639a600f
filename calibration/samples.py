"""Samples: arrays by input name, from an .npz file, a folder of them, or made up.

An .npz holds one array per model input, [N, …], and may hold `label`, int64 [N]. Stored uint8 images become the model's
input as (x · scale − mean) / std, the preprocessing that the student's file names; float arrays are taken as they are.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from profiles.errors import GpusqError

LABEL = "label"
_SAVEZ = "write it with numpy.savez, without objects"


@dataclass(frozen=True)
class InputSpec:
    """One input: its shape without the batch, and how a uint8 sample becomes the float that it takes."""

    shape: tuple[Annotated[int, Field(gt=0)], ...]
    dtype: str
    scale: float = 1.0
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True)
class Samples:
    """Model inputs [N, …] by name, with labels [N] where they are known."""

    inputs: Mapping[str, npt.NDArray[Any]]
    labels: npt.NDArray[np.int64] | None
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def load_samples(path: Path, specs: Mapping[str, InputSpec]) -> Samples:
    """Read the samples in `path`, an .npz file or a folder of .npz files, taken in the order of their names.

    Raises:
        GpusqError: nothing is there, an input is missing, or an array does not fit its input.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise GpusqError(f"no samples in {path}", hint="give an .npz file, or a folder of them")
    parts = [_read(file, specs) for file in files]
    labels = [part[LABEL] for part in parts if LABEL in part]
    if labels and len(labels) != len(parts):
        unlabelled = next(file for file, part in zip(files, parts, strict=True) if LABEL not in part)
        raise GpusqError(f"{unlabelled} has no labels, other files do", hint=f"add '{LABEL}', or remove it everywhere")
    return Samples(
        inputs={
            name: np.concatenate([part[name] for part in parts]).astype(spec.dtype, copy=False)
            for name, spec in specs.items()
        },
        labels=np.concatenate(labels).astype(np.int64, copy=False) if labels else None,
        source=path.resolve().name,
        sha256=_digest(*(file.read_bytes() for file in files)),
    )


def random_samples(specs: Mapping[str, InputSpec], count: int, *, seed: int = 0) -> Samples:
    """Return `count` samples: floats from the standard normal distribution, integers and truths 0 or 1."""
    random = np.random.default_rng(seed)
    inputs = {name: _random(spec, count, random) for name, spec in specs.items()}
    source = f"{count} random inputs (standard normal, seed {seed})"
    return Samples(inputs, None, source, _digest(*(array.tobytes() for array in inputs.values())))


def _random(spec: InputSpec, count: int, random: np.random.Generator) -> npt.NDArray[np.generic]:
    shape = (count, *spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(shape, np.float32).astype(spec.dtype, copy=False)
    return random.integers(0, 2, shape).astype(spec.dtype)


def _read(file: Path, specs: Mapping[str, InputSpec]) -> dict[str, npt.NDArray[np.generic]]:
    if not zipfile.is_zipfile(file):
        raise GpusqError(f"{file} is no .npz file", hint=_SAVEZ)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise GpusqError(f"{file} cannot be read as .npz: {error}", hint=_SAVEZ) from None
    for name, spec in specs.items():
        if name not in arrays:
            have = ", ".join(sorted(arrays)) or "nothing"
            raise GpusqError(
                f"{file} has no array '{name}' (it has {have})", hint="its keys must be the model's inputs"
            )
        arrays[name] = _as_input(file, name, arrays[name], spec)
    count, *others = [len(arrays[name]) for name in specs]
    if any(other != count for other in others):
        raise GpusqError(f"{file}: its inputs differ in the number of samples", hint="give every input of each sample")
    if LABEL in arrays and not np.issubdtype(arrays[LABEL].dtype, np.integer):
        raise GpusqError(f"{file}: '{LABEL}' is {arrays[LABEL].dtype.name}", hint="store the classes as integers")
    if LABEL in arrays and arrays[LABEL].shape != (count,):
        raise GpusqError(f"{file} has {arrays[LABEL].size} labels for {count} samples", hint="one label a sample")
    return arrays


def _as_input(file: Path, name: str, array: npt.NDArray[np.generic], spec: InputSpec) -> npt.NDArray[np.generic]:
    if array.ndim == 0 or len(array) == 0 or array.shape[1:] != spec.shape:
        expected = "×".join(str(dim) for dim in ("N", *spec.shape))
        found = "×".join(str(dim) for dim in array.shape) or "a scalar"
        raise GpusqError(
            f"{file}: '{name}' is {found}, the model takes {expected}", hint="resize or reorder the samples"
        )
    if not np.issubdtype(np.dtype(spec.dtype), np.floating):
        if array.dtype.kind not in "iub":
            raise GpusqError(f"{file}: '{name}' is {array.dtype.name}", hint=f"store it as {spec.dtype}")
        return array
    if array.dtype == np.uint8:
        return ((array.astype(np.float32) * np.float32(spec.scale)) - np.float32(spec.mean)) / np.float32(spec.std)
    if not np.issubdtype(array.dtype, np.floating):
        raise GpusqError(f"{file}: '{name}' is {array.dtype.name}", hint="store uint8 images or float model inputs")
    if not np.isfinite(array).all():
        raise GpusqError(f"{file}: '{name}' holds NaN or infinity", hint="clean the samples")
    return array


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
