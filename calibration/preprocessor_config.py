"""The preprocessing that a model's library wrote down: timm's pretrained_cfg, transformers' preprocessor_config.json.

    timm:          crop_pct, crop_mode, interpolation, mean, std, for the size of the model's input
    transformers:  size as a number, {height, width} or {shortest_edge}, crop_size, resample, rescale_factor,
                   image_mean, image_std; crop_pct of ConvNeXt; rescale_offset and include_top of EfficientNet

What is asked for and is not among these is refused, never left out silently.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibration.preprocessing import Interpolation, Preprocessing, Size
from profiles.errors import GpusqError
from profiles.record import first_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "preprocessor_config.json"
_NESTED = "processor_config.json"
_TIMM_CROP = 0.875  # timm.data.constants.DEFAULT_CROP_PCT
_WARPED_FROM = 384  # ConvNextImageProcessor stretches larger images and crops smaller ones
_STEPS = frozenset({"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order"})
_HARMLESS = frozenset({"do_convert_rgb", "do_reduce_labels", "do_convert_annotations"})
_RESAMPLE: dict[int, Interpolation] = dict(
    enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"))  # numbers of PIL.Image.Resampling
)
_OWN_FILE = "write the steps into a TOML file, and give it with --preprocessing"


def read_preprocessing(path: Path, size: Size | None) -> Preprocessing:
    """Return what `path` says about images: a TOML file, or a JSON file of timm or transformers.

    `size` is that of the model's input, where it is fixed; timm's config resizes to it.

    Raises:
        GpusqError: it cannot be read, has unknown keys, or asks for a step that is not known here.
    """
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise GpusqError(f"{path} cannot be read as TOML or JSON: {error}", hint=_OWN_FILE) from None
    if text.lstrip().startswith("{"):
        return from_json(stored, size, str(path))
    try:
        return Preprocessing.model_validate(stored)
    except ValidationError as error:
        raise GpusqError(
            f"{path}: {first_problem(error)}", hint=f"its keys are {', '.join(Preprocessing.model_fields)}"
        ) from None


def from_json(stored: Mapping[str, Any], size: Size | None, where: str) -> Preprocessing:
    """Return what a JSON object of timm's or transformers' says, whichever it is."""
    if isinstance(stored.get("image_processor"), dict):
        stored = stored["image_processor"]
    config = stored.get("pretrained_cfg", stored)
    try:
        return from_timm(config, size) if "crop_pct" in config and "mean" in config else from_huggingface(stored, where)
    except ValidationError as error:
        raise GpusqError(f"{where}: {first_problem(error)}", hint=_OWN_FILE) from None


def beside(folder: Path) -> Path | None:
    """The file of transformers in `folder` that describes its images, if there is one."""
    if (folder / FILE).is_file():
        return folder / FILE
    nested = folder / _NESTED
    return nested if nested.is_file() and '"image_processor"' in nested.read_text(encoding="utf-8") else None


def from_timm(config: Mapping[str, Any], size: Size | None) -> Preprocessing:
    """What timm's transforms_imagenet_eval does for an input of `size`: ⌊size / crop_pct⌋, then the middle of it."""
    size = size or tuple(config["input_size"][1:])
    crop = config.get("crop_pct") or _TIMM_CROP
    mean = tuple(config["mean"])
    height, width = (math.floor(length / crop) for length in size)
    mode = config.get("crop_mode") or "center"
    square = mode == "center" and height == width
    return Preprocessing(
        resize=height if square else (height, width),
        fit="stretch" if square else {"squash": "stretch", "border": "inside"}.get(mode, "cover"),  # type: ignore[arg-type]
        crop=size,
        interpolation=config.get("interpolation") or "bilinear",
        mean=mean,
        std=tuple(config["std"]),
        colours="grey" if len(mean) == 1 else "RGB",
        fill=tuple(round(255 * level) for level in mean) if mode == "border" else (0,),
    )


def from_huggingface(stored: Mapping[str, Any], where: str) -> Preprocessing:
    """What transformers' image processor of this config does to one image.

    Raises:
        GpusqError: it asks for a step that is not known here.
    """
    asked = {key for key, value in stored.items() if key.startswith("do_") and value}
    if unknown := sorted(asked - _STEPS - _HARMLESS):
        raise GpusqError(f"{where} asks for {unknown[0]}, which is not done here", hint=_OWN_FILE)
    resize, crop = _sizes(stored, asked, where)
    mean, std = _mean_and_std(stored, asked)
    return Preprocessing(
        resize=resize,
        crop=crop,
        crop_rounding="down",
        interpolation=_RESAMPLE.get(stored.get("resample", 2), "bilinear"),
        scale=stored.get("rescale_factor", 1 / 255) if stored.get("do_rescale", True) else 1.0,
        mean=mean,
        std=std,
        colours="BGR" if "do_flip_channel_order" in asked else "RGB",
    )


def _sizes(stored: Mapping[str, Any], asked: set[str], where: str) -> tuple[int | Size | None, Size | None]:
    """What an image is resized to, and what is cropped of it."""
    size = stored.get("size")
    crop = _height_and_width(stored.get("crop_size")) if "do_center_crop" in asked else None
    if "do_resize" not in asked or size is None:
        return None, crop
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return _height_and_width(size), crop
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if shortest is None or (isinstance(size, Mapping) and size.get("longest_edge")):
        raise GpusqError(f"{where} resizes to {size}, which gives every image another size", hint=_OWN_FILE)
    if "crop_pct" in stored:
        if shortest < _WARPED_FROM:
            return int(shortest / stored["crop_pct"]), (shortest, shortest)
        return (shortest, shortest), None
    # A bare number, of older versions, meant a square where nothing is cropped.
    return (shortest if crop or isinstance(size, Mapping) else (shortest, shortest)), crop


def _mean_and_std(stored: Mapping[str, Any], asked: set[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if "do_normalize" in asked:
        mean, std = _numbers(stored["image_mean"]), _numbers(stored["image_std"])
    if stored.get("rescale_offset"):  # x · factor − 1, before the mean is taken away
        mean = tuple(level + 1 for level in mean)
    if stored.get("include_top") and "do_normalize" in asked:  # EfficientNet divides by the deviation once more
        std = tuple(level * level for level in std)
    return mean, std


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (float(value),)


def _height_and_width(size: Any) -> Size | None:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return None if size is None else (int(size), int(size))
