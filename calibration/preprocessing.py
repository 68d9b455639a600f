"""How an image becomes the input of a model.

    decoded ─► colours ─► resized ─► cropped (padded where too small) ─► (x · scale − mean) / std ─► NCHW or NHWC

It is what the model was trained with, from timm's or Hugging Face's config, or a TOML file of the same keys:

    resize = 256                          # the shorter side; or [height, width], see fit
    fit = "stretch"                       # or cover (then crop), inside (then pad), of two numbers
    crop = [224, 224]
    interpolation = "bicubic"
    scale = 0.00392156862745098
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    layout = "NCHW"
    colours = "RGB"                       # RGB, BGR or grey
    fill = [0, 0, 0]

All of it is Pillow's: timm resizes with it too, and transformers does in its PIL processors. Its torchvision
processors round the resized pixel another way, by at most two of its 256 levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from profiles.record import Record

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Colours = Literal["RGB", "BGR", "grey"]
MODES: dict[Colours, str] = {"RGB": "RGB", "BGR": "RGB", "grey": "L"}


class Preprocessing(Record):
    """The steps from an image to an input; sizes are (height, width) in pixels."""

    resize: Annotated[int, Field(gt=0)] | Size | None = None
    fit: Literal["stretch", "cover", "inside"] = "stretch"
    crop: Annotated[int, Field(gt=0)] | Size | None = None
    crop_rounding: Literal["half-even", "down"] = Field(
        default="half-even", description="Of half a pixel: torchvision's way, and transformers'."
    )
    interpolation: Interpolation = "bilinear"
    scale: Annotated[float, Field(gt=0)] = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colours: Colours = "RGB"
    fill: tuple[Annotated[int, Field(ge=0, le=255)], ...] = (0,)

    @model_validator(mode="after")
    def _levels_fit_channels(self) -> Preprocessing:
        for key in ("mean", "std", "fill"):
            if len(getattr(self, key)) not in (1, self.channels):
                raise ValueError(f"{key} has {len(getattr(self, key))} numbers for {self.channels} channels")
        return self

    @property
    def channels(self) -> int:
        """How many the result has."""
        return 1 if self.colours == "grey" else 3

    @property
    def output_size(self) -> Size | None:
        """Height and width of every result, or None where they depend on the image."""
        if self.crop is not None:
            return _square(self.crop)
        return self.resize if isinstance(self.resize, tuple) and self.fit == "stretch" else None

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The pixels of `image`, resized and cropped: uint8 [H, W, C]."""
        if image.mode == "P":  # the same colours, without Pillow's warning about transparent ones
            image = image.convert("RGBA")
        image = image.convert(MODES[self.colours])
        size = self._resized(image.height, image.width)
        if size != (image.height, image.width):
            image = image.resize((size[1], size[0]), _resampling(self.interpolation))
        if self.crop is not None:
            image = self._cropped(image, *_square(self.crop))
        array = np.asarray(image).reshape(image.height, image.width, self.channels)
        return array[..., ::-1] if self.colours == "BGR" else array

    def __call__(self, pixels: npt.NDArray[np.uint8], *, channels_last: bool = True) -> npt.NDArray[np.float32]:
        """Return float32 [N, C, H, W], or [N, H, W, C], of uint8 pixels [N, H, W, C], or of [N, C, H, W]."""
        if not channels_last:
            pixels = np.moveaxis(pixels, 1, -1)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        found = (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(np.moveaxis(found, -1, 1)) if self.layout == "NCHW" else found

    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that it can give."""
        ends = [(level * self.scale - np.asarray(self.mean)) / np.asarray(self.std) for level in (0, 255)]
        return float(np.min(ends)), float(np.max(ends))

    def _resized(self, height: int, width: int) -> Size:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, int):
            shorter, longer = self.resize, int(self.resize * max(height, width) / min(height, width))
            return (shorter, longer) if height <= width else (longer, shorter)
        if self.fit == "stretch":
            return self.resize
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The middle of `image`; first a border of `fill` where it is too small."""
        if image.height < height or image.width < width:
            image = self._padded(image, max(height, image.height), max(width, image.width))
        top, left = self._half(image.height - height), self._half(image.width - width)
        return image.crop((left, top, left + width, top + height))

    def _padded(self, image: Image.Image, height: int, width: int) -> Image.Image:
        from PIL import Image as Images

        fill = self.fill * (self.channels // len(self.fill))
        canvas = Images.new(image.mode, (width, height), fill if self.channels > 1 else fill[0])
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas

    def _half(self, length: int) -> int:
        return round(length / 2) if self.crop_rounding == "half-even" else length // 2


def _square(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size


def _resampling(name: Interpolation) -> Any:
    from PIL import Image

    return Image.Resampling[name.upper()]
