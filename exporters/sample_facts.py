"""What a student tells about the samples that it takes: the images' preprocessing, its tokenizer, its first layer.

| said by | for |
|---|---|
| preprocessor_config.json, or a config.json of timm, beside the checkpoint | images |
| `pretrained_cfg` of the module | students of timm |
| the transforms of the released weights | students of torchvision |
| the letter box of ultralytics | students of ultralytics |
| tokenizer.json beside the checkpoint | texts |
| a batch normalization right behind a convolution on an input | the range of what was trained on |
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.first_layer import FirstLayer
from calibration.image_input import ModelFacts, size_of
from calibration.input_spec import InputSpec
from calibration.preprocessing import Preprocessing, Size
from calibration.preprocessor_config import beside, from_json, from_timm
from exporters.architecture import parse_spec
from exporters.checkpoint import config_of
from exporters.graph_student import GraphStudent
from exporters.kinds import read_json
from exporters.student import ModuleStudent, Student, sample_specs
from profiles.errors import GpusqError

_GREY_FILL = 114  # ultralytics.data.augment.LetterBox
Said = tuple[Preprocessing, str]


def sample_facts(student: Student, checkpoint: Path) -> ModelFacts:
    """Return what `student`, read from `checkpoint`, tells about its samples."""
    folder = _folder(student, checkpoint)
    specs = sample_specs(student)
    facts = ModelFacts(tokenizer=folder, first_layer=_first_layer(student))
    first = next(iter(specs.values()), None)
    if first is None or len(specs) != 1 or len(first.shape) != 3:
        return facts
    size = size_of(first, channels_last=False)
    try:
        said = next((found for say in _SAY if (found := say(student, folder, size)) is not None), None)
    except GpusqError as error:
        return replace(facts, refused=error.message)
    if said is None:
        return facts
    steps, origin = said
    return replace(facts, preprocessing=_for_channels(steps, first), origin=origin)


def _folder(student: Student, checkpoint: Path) -> Path:
    """Where the configs lie: the folder of the checkpoint, or that of `hf:DIR`."""
    if student.model.startswith("hf:"):
        return Path(parse_spec(student.model).name)
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _by_file(student: Student, folder: Path, size: Size | None) -> Said | None:
    file = beside(folder)
    if file is None:
        return None
    content = read_json(file)
    return (from_json(content, size, str(file)), file.name) if isinstance(content, dict) else None


def _by_timm(student: Student, folder: Path, size: Size | None) -> Said | None:
    stored = config_of(folder).get("pretrained_cfg")
    if isinstance(stored, Mapping) and {"mean", "std", "input_size"} <= stored.keys():
        return from_timm(stored, size), "timm's config.json"
    config = _attribute(student, "pretrained_cfg")
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    tag = config.get("tag")
    name = ".".join(filter(None, (config.get("architecture"), tag)))
    return from_timm(config, size), f"timm's config of {name}"


def _by_torchvision(student: Student, folder: Path, size: Size | None) -> Said | None:
    if not student.model.startswith("torchvision:"):
        return None
    models: Any = importlib.import_module("torchvision.models")
    weights = models.get_model_weights(parse_spec(student.model).name)
    preset: Any = next((one.transforms() for one in reversed(list(weights))), None)
    if type(preset).__name__ != "ImageClassification":
        return None
    steps = Preprocessing(
        resize=preset.resize_size[0],
        crop=size or preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return steps, "torchvision's transforms of its released weights"


def _by_ultralytics(student: Student, folder: Path, size: Size | None) -> Said | None:
    if size is None or not student.model.startswith(("ultralytics:", "ultralytics.")):
        return None
    return Preprocessing(resize=size, fit="inside", crop=size, fill=(_GREY_FILL,)), "ultralytics' letter box"


_SAY: tuple[Callable[[Student, Path, Size | None], Said | None], ...] = (
    _by_file,
    _by_timm,
    _by_torchvision,
    _by_ultralytics,
)


def _for_channels(steps: Preprocessing, spec: InputSpec) -> Preprocessing:
    """`steps` for an input of one channel, as timm does it: grey, with the average of the means."""
    if spec.shape[0] != 1 or steps.channels == 1:
        return steps
    averages = {key: (float(np.mean(getattr(steps, key))),) for key in ("mean", "std")}
    return steps.model_copy(update={"colours": "grey", "fill": steps.fill[:1], **averages})


def _attribute(student: Student, name: str) -> Any:
    if not isinstance(student, ModuleStudent):
        return None
    return next((getattr(one, name) for one in student.module.modules() if hasattr(one, name)), None)


def _first_layer(student: Student) -> FirstLayer | None:
    """The convolution on an image with a trained batch normalization right behind it, where there is one."""
    found = _of_module(student) if isinstance(student, ModuleStudent) else None
    if isinstance(student, GraphStudent):
        found = next(_of_graph(student.graph.graph), None)
    return None if found is None or bool((found.variance == 1).all()) else found  # all ones: it was never trained


def _of_module(student: ModuleStudent) -> FirstLayer | None:
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    image = next((one for one in student.inputs if len(one.shape) == 4), None)
    layers = [one for one in student.module.modules() if isinstance(one, (nn.Conv2d, _BatchNorm))]
    if image is None or len(layers) < 2:
        return None
    convolution, normalization = layers[:2]
    if not isinstance(convolution, nn.Conv2d) or not isinstance(normalization, _BatchNorm):
        return None
    if convolution.in_channels != image.shape[1] or convolution.groups != 1 or convolution.dilation != (1, 1):
        return None
    variance = normalization.running_var
    if variance is None or normalization.num_features != convolution.out_channels:
        return None
    return FirstLayer(image.name, convolution.weight.detach().float().numpy(), variance.float().numpy())


def _of_graph(graph: ir.Graph) -> Iterator[FirstLayer]:
    for value in graph.inputs:
        for convolution, _ in value.uses():
            if convolution.op_type != "Conv" or convolution.inputs[0] is not value:
                continue
            group, dilations = convolution.attributes.get("group"), convolution.attributes.get("dilations")
            plain = (group is None or group.as_int() == 1) and (dilations is None or set(dilations.as_ints()) == {1})
            weight = _constant(convolution.inputs[1])
            after = [node for node, _ in convolution.outputs[0].uses()]
            if (
                not plain
                or weight is None
                or weight.ndim != 4
                or [node.op_type for node in after] != ["BatchNormalization"]
            ):
                continue
            variance = _constant(after[0].inputs[4])
            if variance is not None and value.name:
                yield FirstLayer(value.name, weight, variance)


def _constant(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy().astype(np.float32)
