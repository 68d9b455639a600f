"""Samples from nothing but the network: images, or text.

| the network takes | and has | samples |
|---|---|---|
| images [C, H, W] | BatchNorm | match its statistics |
| | attentions over patches | have diverse patches |
| | detections as outputs | show what it was asked to see, and detects |
| token ids [T] first | logits of the next token | are texts that it writes |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from calibration.preprocessing import Preprocessing
from calibration.samples import SYNTHETIC, InputSpec, Samples
from calibration.selection import digest_of, members_of
from calibration.synthetic.images import Bounds, Recipe, look, make_images
from calibration.synthetic.text import BATCH, write_text
from profiles.errors import GpusqError

Advance = Callable[[float], None]
NOTE = "the samples are synthetic: ranges and agreement on real ones differ"
_HINT = "give real samples: --data calib.npz"
_RANGE = (-2.64, 2.64)  # of pixels with ImageNet's mean and deviation, where nothing is known of the preprocessing
_COLOURS = (1, 3)


def synthesize(
    network: torch.nn.Module,
    specs: Mapping[str, InputSpec],
    count: int,
    *,
    seed: int = 0,
    steps: Preprocessing | None = None,
    recipe: Recipe | None = None,
    batch: int | None = None,
    advance: Advance = lambda share: None,
) -> Samples:
    """Return samples made of `network` alone; the same for the same seed, on the same machine and torch.

    Args:
        network: the float network in eval mode, which is left as it was.
        specs: its inputs, in the order of its forward.
        count: samples; a detector may give fewer.
        seed: of all random numbers.
        steps: how images become the input, which bounds its pixels; by default the scale, mean and std of its spec.
        recipe: how images are made.
        batch: the number of samples that the network takes at once, where that is fixed.
        advance: is told the share that is done.

    Raises:
        GpusqError: there is nothing in the network that could tell its data from noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with _frozen(network):
        if not np.issubdtype(np.dtype(next(iter(specs.values())).dtype), np.floating):
            inputs, how = (
                write_text(network, specs, count, generator, advance, batch or BATCH),
                "text of the model itself",
            )
        else:
            inputs, how = _images(
                network, specs, steps, count, generator, _with_batch(recipe or Recipe(), batch), advance
            )
    arrays = {name: tensor.numpy().astype(specs[name].dtype, copy=False) for name, tensor in inputs.items()}
    made = len(next(iter(arrays.values())))
    source = f"{made} synthetic inputs ({how}, seed {seed})"
    members = members_of([f"{SYNTHETIC}[{row}]" for row in range(made)], arrays, source)
    return Samples(arrays, None, source, digest_of(members), members, made, (NOTE,), steps)


def _images(
    network: torch.nn.Module,
    specs: Mapping[str, InputSpec],
    steps: Preprocessing | None,
    count: int,
    generator: torch.Generator,
    recipe: Recipe,
    advance: Advance,
) -> tuple[dict[str, torch.Tensor], str]:
    (name, spec), *others = specs.items()
    if others or len(spec.shape) != 3 or spec.shape[0] not in _COLOURS:
        raise GpusqError(
            "only images [C, H, W] of 1 or 3 channels and token ids can be synthesized, and this network takes "
            + ", ".join(f"{name} {'×'.join(map(str, spec.shape))}" for name, spec in specs.items()),
            hint=_HINT,
        )
    channels, height, width = spec.shape
    shape = (channels, height, width)
    seen = look(network, shape, recipe.batch)
    if not (seen.norms or seen.attentions or seen.classes):
        raise GpusqError(
            "no images can be synthesized: the network has neither BatchNorm nor attention, nor does it answer boxes"
            " (an exporter may have folded BatchNorm into the weights)",
            hint="give the checkpoint that the graph was exported from, or real samples: --data calib.npz",
        )
    images = make_images(network, shape, _bounds(spec, steps), count, generator, recipe, advance)
    if not len(images):
        raise GpusqError("the detector found none of the objects that its images were made for", hint=_HINT)
    return {name: images}, str(seen)


def _with_batch(recipe: Recipe, batch: int | None) -> Recipe:
    return recipe if batch is None else replace(recipe, batch=batch)


def _bounds(spec: InputSpec, steps: Preprocessing | None) -> Bounds:
    """The values of black and white pixels, [C, 1, 1]; a normalized photo's where the preprocessing is unknown."""
    if steps is not None:
        scale, mean, std = steps.scale, torch.tensor(steps.mean), torch.tensor(steps.std)
    elif (spec.scale, spec.mean, spec.std) != (1.0, 0.0, 1.0):
        scale, mean, std = spec.scale, torch.tensor([spec.mean]), torch.tensor([spec.std])
    else:
        return torch.full((1, 1, 1), _RANGE[0]), torch.full((1, 1, 1), _RANGE[1])
    low, high = (((value * scale - mean) / std)[:, None, None] for value in (0, 255))
    return low, high


@contextmanager
def _frozen(network: torch.nn.Module) -> Iterator[None]:
    """No gradients to the parameters meanwhile: half the work."""
    wanted = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, gradient in wanted.items():
            parameter.requires_grad_(gradient)
