"""Samples: the inputs of a model, many times over, from whatever the user has.

| source | what it is known by |
|---|---|
| a folder of images, or one image | the first bytes of its files; needs the model's preprocessing |
| .npz, .npy, safetensors, or a folder of them | the first bytes; arrays [N, …] by input name, and `label` |
| lines of JSON | its first line is a JSON object; texts for a tokenizer, or the inputs by name |
| polygraphy's JSON of feed dicts | it starts with a list |
| `module:function` | there is no such file; feed dicts of Python |
| `synthetic` | there is no such file; made of the model alone: calibration.synthetic |

Stored uint8 arrays become floats by the model's preprocessing, or as (x · scale − mean) / std where its student file
says that; float arrays are taken as they are. What is wrong is found here, before a model is exported or run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.array_file import Convert, is_array_file, read_array_files
from calibration.feed_dicts import FACTORY, read_factory, read_polygraphy
from calibration.first_layer import doubts
from calibration.image_folder import images_in, is_image, read_images
from calibration.image_input import ImageInput, ModelFacts, SampleSource, image_preprocessing, needed_preprocessing
from calibration.input_spec import InputSpec, SampleSpec
from calibration.preprocessing import Preprocessing
from calibration.rows import Rows
from calibration.selection import Choice, Member, Read, digest_of, listing
from calibration.text_lines import load_tokenizer, read_lines
from calibration.value_range import doubtful_range
from profiles.errors import GpusqError

__all__ = [
    "SYNTHETIC",
    "InputSpec",
    "ModelFacts",
    "Rows",
    "SampleSource",
    "SampleSpec",
    "Samples",
    "load_samples",
    "random_samples",
]

FEW = 32
SYNTHETIC = "synthetic"
_ENOUGH = "128 to 512"
_SOURCES = (
    "give images, .npz, .npy, safetensors, JSON lines, a folder of images or arrays, or a Python function as "
    "module:function"
)
_HEAD = 4096
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Samples:
    """Model inputs [N, …] by name, with labels [N] where they are known.

    Attributes:
        inputs: rows that may be read or computed when they are asked for; see calibration.rows.
        labels: int64 [N].
        source: where they come from, in words.
        sha256: of the SHA-256 of its members, one a line, in their order.
        members: the samples that are used, each with its SHA-256.
        available: how many there were to choose from.
        notes: what was converted, and what may be wrong with them.
        preprocessing: how images became inputs; empty where none did.
    """

    inputs: Mapping[str, Rows]
    labels: npt.NDArray[np.int64] | None
    source: str
    sha256: str
    members: tuple[Member, ...] = ()
    available: int = 0
    notes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def listing(self) -> str:
        """The list of the samples as sha256sum writes it."""
        return listing(self.members)


def load_samples(
    given: SampleSource | str | Path,
    specs: Mapping[str, InputSpec],
    facts: ModelFacts | None = None,
    progress: Progress = lambda share: None,
) -> Samples:
    """Read the samples in `given`, the kind of which is told by its content.

    Args:
        given: the source, with or without what the user says about it.
        specs: the model's inputs.
        facts: what the model tells about its samples.
        progress: is told the share of the images that is read.

    Raises:
        GpusqError: nothing is there, an input is missing, a sample is damaged or does not fit its input.
    """
    given = given if isinstance(given, SampleSource) else SampleSource(str(given))
    if given.count is not None and given.count < 1:
        raise GpusqError(f"{given.count} samples are none", hint="give --samples a number from 1 on")
    facts = facts or ModelFacts()
    how = image_preprocessing(given, specs, facts)
    read = _read(given, specs, facts, how, progress)
    return Samples(
        inputs=read.inputs,
        labels=read.labels,
        source=given.source if FACTORY.fullmatch(given.source) else Path(given.source).resolve().name,
        sha256=digest_of(read.members),
        members=read.members,
        available=read.available,
        notes=(*read.notes, *_few(len(read.members)), *_doubts(read.inputs, facts, how)),
        preprocessing=None if how is None else how.steps,
    )


def random_samples(specs: Mapping[str, InputSpec], count: int, *, seed: int = 0) -> Samples:
    """Return `count` samples: floats from the standard normal distribution, integers and truths 0 or 1."""
    inputs = random_inputs(specs, count, seed=seed)
    source = f"{count} random inputs (standard normal, seed {seed})"
    digest = hashlib.sha256()
    for array in inputs.values():
        digest.update(array.tobytes())
    return Samples(inputs, None, source, digest.hexdigest())


def random_inputs(specs: Mapping[str, InputSpec], count: int, *, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `random_samples`."""
    random = np.random.default_rng(seed)
    return {name: _random(spec, count, random) for name, spec in specs.items()}


def _read(
    given: SampleSource,
    specs: Mapping[str, InputSpec],
    facts: ModelFacts,
    how: ImageInput | None,
    progress: Progress,
) -> Read:
    """The chosen samples of whatever kind the source is."""
    choice, to_float = Choice(given.count, given.seed), _to_float(specs, how)
    path = Path(given.source)
    if not path.exists() and FACTORY.fullmatch(given.source):
        return read_factory(given.source, specs, to_float, choice)
    files = _files(path)
    images = [file for file in files if is_image(file)]
    if len(images) == len(files):
        folder = path if path.is_dir() else path.parent
        return read_images(images, folder, needed_preprocessing(how, specs, facts, path), choice, progress)
    kind = "" if path.is_dir() else _kind_of_text(path)
    if kind == "lines":
        tokenizer = given.tokenizer or facts.tokenizer or path.parent
        return read_lines(path, specs, to_float, choice, lambda: load_tokenizer(tokenizer))
    if kind == "list":
        return read_polygraphy(path, specs, to_float, choice)
    return read_array_files(files, specs, to_float, choice)


def _files(path: Path) -> list[Path]:
    """The file at `path`, or those of one kind in the folder there: images, or else arrays."""
    if not path.is_dir():
        files = [path] if path.is_file() else []
    else:
        images = images_in(path)
        arrays = [file for file in sorted(path.iterdir()) if file.is_file() and is_array_file(file)]
        if images and arrays:
            raise GpusqError(
                f"{path} holds images ({images[0].name}) and arrays ({arrays[0].name})",
                hint="give a folder of one kind",
            )
        files = images or arrays
    if not files:
        raise GpusqError(f"no samples in {path}", hint=_SOURCES)
    return files


def _kind_of_text(path: Path) -> Literal["lines", "list", ""]:
    with path.open("rb") as file:
        head = file.read(_HEAD).lstrip()
    return "lines" if head.startswith(b"{") else "list" if head.startswith(b"[") else ""


def _to_float(specs: Mapping[str, InputSpec], how: ImageInput | None) -> Convert:
    """What makes uint8 batches of an input its floats."""

    def convert(name: str, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if how is not None and name == how.name:
            return how.steps(batch, channels_last=how.steps.layout == "NHWC")
        spec = specs[name]
        scaled = batch.astype(np.float32) * np.float32(spec.scale)
        result: npt.NDArray[Any] = (scaled - np.float32(spec.mean)) / np.float32(spec.std)
        return result

    return convert


def _few(count: int) -> tuple[str, ...]:
    if count >= FEW:
        return ()
    return (f"{'one sample is' if count == 1 else f'{count} samples are'} few to measure ranges on: give {_ENOUGH}",)


def _doubts(inputs: Mapping[str, Rows], facts: ModelFacts, how: ImageInput | None) -> tuple[str, ...]:
    """What speaks against the range of the samples: the first layer where it remembers, else their values."""
    told = () if facts.first_layer is None else doubts(facts.first_layer, inputs)
    return told or tuple(doubtful_range(inputs, None if how is None else how.steps))


def _random(spec: InputSpec, count: int, random: np.random.Generator) -> npt.NDArray[Any]:
    shape = (count, *spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(shape, np.float32).astype(spec.dtype, copy=False)
    return random.integers(0, 2, shape).astype(spec.dtype)
