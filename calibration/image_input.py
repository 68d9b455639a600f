"""How images become the one input of a model that takes them: what the user says, else what the model tells.

--preprocessing FILE  ►  timm's or transformers' config  ►  scale, mean and std of a student file
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibration.first_layer import FirstLayer
from calibration.input_spec import InputSpec, varying_axes
from calibration.preprocessing import Preprocessing, Size
from calibration.preprocessor_config import read_preprocessing
from profiles.errors import GpusqError

_CHANNELS = (1, 3)
_AXES = 3


@dataclass(frozen=True)
class SampleSource:
    """What the user says about samples.

    Attributes:
        source: a path, or `module:function`.
        count: how many are used, all by default.
        seed: of their choice.
        preprocessing: a file that says how images become inputs; the model's own steps by default.
        tokenizer: a folder with tokenizer.json; the model's own by default.
    """

    source: str
    count: int | None = None
    seed: int = 0
    preprocessing: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a model tells about the samples that it takes.

    Attributes:
        preprocessing: how an image becomes its input; None where nothing tells.
        origin: where that is from, in words.
        refused: what it says about images that cannot be done here; empty where that is nothing.
        tokenizer: where its tokenizer would lie.
        first_layer: what the first batch normalization was trained on.
    """

    preprocessing: Preprocessing | None = None
    origin: str = ""
    refused: str = ""
    tokenizer: Path | None = None
    first_layer: FirstLayer | None = None


@dataclass(frozen=True)
class ImageInput:
    """The input that takes images, and how it does.

    Attributes:
        name: of the input.
        spec: its shape and type.
        steps: from an image to it.
        origin: who says so, in words.
    """

    name: str
    spec: InputSpec
    steps: Preprocessing
    origin: str


def image_preprocessing(given: SampleSource, specs: Mapping[str, InputSpec], facts: ModelFacts) -> ImageInput | None:
    """Return how images become the model's input, or None where nothing tells, or no one input takes images.

    Raises:
        GpusqError: the user's file cannot be read.
    """
    found = _image_input(specs)
    if found is None:
        return None
    name, spec, last = found
    if given.preprocessing is not None:
        return ImageInput(
            name, spec, read_preprocessing(given.preprocessing, size_of(spec, last)), str(given.preprocessing)
        )
    if facts.preprocessing is not None:
        return ImageInput(name, spec, _laid_out(facts.preprocessing, last), facts.origin)
    size = size_of(spec, last)
    if size is None or (spec.scale, spec.mean, spec.std) == (1.0, 0.0, 1.0):
        return None
    channels = spec.shape[2 if last else 0]
    steps = Preprocessing(
        resize=size,
        fit="cover",
        crop=size,
        scale=spec.scale,
        mean=(spec.mean,),
        std=(spec.std,),
        colours="grey" if channels == 1 else "RGB",
    )
    return ImageInput(name, spec, _laid_out(steps, last), "the student's file")


def needed_preprocessing(
    how: ImageInput | None, specs: Mapping[str, InputSpec], facts: ModelFacts, path: Path
) -> ImageInput:
    """`how`, or the error that says what is missing to read the images in `path`."""
    if how is not None:
        return how
    if _image_input(specs) is None:
        takes = ", ".join(f"{name} {list(spec.shape)}" for name, spec in specs.items())
        raise GpusqError(
            f"{path} holds images, and the model takes {takes}", hint="give arrays by input name, in an .npz file"
        )
    raise GpusqError(
        facts.refused or f"nothing tells how the images in {path} become the model's input",
        hint="give --preprocessing FILE: a TOML file with resize, crop, mean, std, or the preprocessor_config.json",
    )


def size_of(spec: InputSpec, channels_last: bool) -> Size | None:
    """Height and width of an image input, or None where they may vary."""
    axes = (0, 1) if channels_last else (1, 2)
    if set(axes) & set(varying_axes(spec)):
        return None
    return spec.shape[axes[0]], spec.shape[axes[1]]


def _image_input(specs: Mapping[str, InputSpec]) -> tuple[str, InputSpec, bool] | None:
    """The only input, if it is one of images, and whether its channels come last."""
    if len(specs) != 1:
        return None
    ((name, spec),) = specs.items()
    if len(spec.shape) != _AXES:
        return None
    if spec.shape[0] in _CHANNELS and 0 not in varying_axes(spec):
        return name, spec, False
    return (name, spec, True) if spec.shape[2] in _CHANNELS and 2 not in varying_axes(spec) else None


def _laid_out(steps: Preprocessing, channels_last: bool) -> Preprocessing:
    return steps.model_copy(update={"layout": "NHWC" if channels_last else "NCHW"})
