"""Build the torch module that a spec names, and tell what it takes.

    timm:NAME[?keyword=value&…]          timm's create_model
    torchvision:NAME[?keyword=value&…]   torchvision.models.get_model
    hf:DIR[#part]                        the config.json of a Hugging Face folder; see exporters.huggingface
    ultralytics:NAME.yaml                a detection model of ultralytics, with its export format
    package.module:factory[?…]           the user's own code

The weights are not part of it: the module comes with fresh ones, and `Architecture.weights_module` takes the trained.
User code is imported because the user named it on the command line; a checkpoint never names any.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from calibration.user_code import working_directory_importable
from exporters.signature import DTYPES, Input
from profiles.errors import GpusqError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
_SPEC = re.compile(r"(?P<source>[A-Za-z_][\w.]*):(?P<name>[^?#]+)(\?(?P<query>[^#]*))?(#(?P<part>\w+))?")
_INPUT_HINT = "give it as --input NAME=1x3x224x224"
_SHOWN = 5


@dataclass(frozen=True)
class Architecture:
    """A module without its trained weights.

    Attributes:
        module: takes the inputs in their order and returns tensors, in eval mode.
        inputs: what it takes.
        outputs: names of its outputs; None where the exporter is to choose.
        root: the name of the weights' module within `module`, where a wrapper stands around it.
        notes: what was inferred.
    """

    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...] | None = None
    root: str = ""
    notes: tuple[str, ...] = ()

    @property
    def weights_module(self) -> torch.nn.Module:
        """The module whose parameters have the names of the checkpoint."""
        return self.module.get_submodule(self.root)


@dataclass(frozen=True)
class Spec:
    """A spec in its parts: `timm:deit_small_patch16_224?num_classes=10`."""

    source: str
    name: str
    keywords: Mapping[str, Any]
    part: str = ""


def build_architecture(
    spec: str,
    *,
    checkpoint_config: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    inputs: Sequence[Input] = (),
) -> Architecture:
    """Build what `spec` names.

    Args:
        spec: as in the module's docstring.
        checkpoint_config: keyword arguments that the checkpoint says it was built with; the spec's own come first.
        shapes: of the tensors in the checkpoint. Where nothing but the head's number of classes misfits, the
            architecture is built again with the checkpoint's number.
        inputs: what the user says about the inputs; they replace the inferred ones of the same name.

    Raises:
        GpusqError: no such architecture or package, arguments that it does not take, or inputs that nothing tells.
    """
    parsed = parse_spec(spec)
    if checkpoint_config:
        parsed = replace(parsed, keywords={**checkpoint_config, **parsed.keywords})
    build = _BUILDERS.get(parsed.source, _user)
    built = build(parsed, inputs)
    built.module.eval()
    keyword = _CLASSES.get(parsed.source)
    if shapes is None or keyword is None or keyword in parsed.keywords:
        return built
    classes = _classes_of_head(built.weights_module, shapes)
    if classes is None:
        return built
    built = build(replace(parsed, keywords={**parsed.keywords, keyword: classes}), inputs)
    built.module.eval()
    return replace(built, notes=(*built.notes, f"{keyword}={classes}: taken from the head's shape in the checkpoint"))


def parse_spec(spec: str) -> Spec:
    """Return the parts of `spec`."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise GpusqError(
            f"{spec!r} names no architecture",
            hint="write timm:NAME, torchvision:NAME, hf:DIR, ultralytics:NAME.yaml or package.module:factory",
        )
    keywords = {key: _value(text) for key, text in parse_qsl(match["query"] or "", keep_blank_values=True)}
    return Spec(match["source"], match["name"], keywords, match["part"] or "")


def resolve_inputs(
    inferred: Sequence[Input], given: Sequence[Input], what: str, order: Sequence[str] = ()
) -> tuple[Input, ...]:
    """The inferred inputs with the given shapes; the given ones alone, in `order`, where nothing was inferred."""
    if not inferred:
        if not given:
            raise GpusqError(f"nothing tells what {what} takes", hint=_INPUT_HINT)
        return tuple(sorted(given, key=lambda one: order.index(one.name) if one.name in order else len(order)))
    named = {one.name: one for one in given}
    if unknown := named.keys() - {one.name for one in inferred}:
        known = ", ".join(one.name for one in inferred)
        raise GpusqError(f"{what} has no input {min(unknown)!r}", hint=f"its inputs are: {known}")
    return tuple(named.get(one.name, one) for one in inferred)


def require(package: str, extra: str, what: str) -> Any:
    """Import `package`, or tell which extra brings it, or why it does not import."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise GpusqError(f"{what} needs {package}", hint=f"pip install 'gpusq[{extra}]'") from error
        reason = str(error).strip().partition("\n")[0]
        raise GpusqError(
            f"{what} needs {package}, which does not import: {reason}",
            hint="its libraries do not fit each other; torchvision must be of the same build as torch",
        ) from error


def unknown_name(name: str, known: Collection[str], where: str) -> GpusqError:
    """The error for a name that is not among `known`, with the nearest that is."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return GpusqError(
        f"{where} has no {name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""),
        hint=f"it has {len(known)}: {', '.join(sorted(known)[:_SHOWN])}{', …' if len(known) > _SHOWN else ''}",
    )


def _timm(spec: Spec, given: Sequence[Input]) -> Architecture:
    timm = require("timm", "timm", f"timm:{spec.name}")
    if not timm.is_model(spec.name.partition(".")[0]):
        raise unknown_name(spec.name, timm.list_models(), "timm")
    module = _call(timm.create_model, spec, spec.name, pretrained=False)
    channels, height, width = timm.data.resolve_data_config({}, model=module)["input_size"]
    if (size := spec.keywords.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    channels = spec.keywords.get("in_chans", channels)
    return Architecture(module, resolve_inputs([_image(channels, height, width)], given, spec.name), ("logits",))


def _torchvision(spec: Spec, given: Sequence[Input]) -> Architecture:
    models = require("torchvision", "timm", f"torchvision:{spec.name}").models
    known = models.list_models()
    if spec.name.lower() not in known:
        raise unknown_name(spec.name, known, "torchvision")
    module = _call(models.get_model, spec, spec.name, weights=None)
    size = _trained_size(models.get_model_weights(spec.name))
    return Architecture(module, resolve_inputs([_image(3, *size)] if size else [], given, spec.name))


def _trained_size(weights: Iterable[Any]) -> tuple[int, int] | None:
    """Height and width that the released weights were trained for; None for detection and video, which have no one."""
    preset = next((one.transforms() for one in reversed(list(weights))), None)
    size = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    if type(preset).__name__ not in ("ImageClassification", "SemanticSegmentation") or not size:
        return None
    return (size[0], size[-1])


def _ultralytics(spec: Spec, given: Sequence[Input]) -> Architecture:
    require("ultralytics", "ultralytics", f"ultralytics:{spec.name}")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # it would call pip for what a file seems to need
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    try:
        config = tasks.yaml_model_load(spec.name)
    except FileNotFoundError as error:
        raise GpusqError(
            f"ultralytics has no {spec.name!r}", hint="name a model's file, such as yolov8n.yaml"
        ) from error
    kind = {"segment": "SegmentationModel", "classify": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel"}
    cls = getattr(tasks, kind.get(tasks.guess_model_task(config), "DetectionModel"))
    return ultralytics_architecture(_call(cls, spec, config, verbose=False), given)


def ultralytics_architecture(module: torch.nn.Module, given: Sequence[Input] = ()) -> Architecture:
    """A model of ultralytics as its own exporter shapes it: one tensor [N, 4 + classes, anchors] of decoded boxes."""
    size = _ultralytics_size(module)
    inputs = resolve_inputs([_image(3, size, size, name="images")], given, "the model")
    dynamic = any(one.dynamic for one in inputs)
    for part in module.modules():
        if hasattr(part, "export"):
            part.export, part.format, part.dynamic = True, "onnx", dynamic  # type: ignore[assignment]
    return Architecture(module, inputs)


def _ultralytics_size(module: torch.nn.Module) -> int:
    """The trained size where the file tells it, else the one that ultralytics takes."""
    size = getattr(module, "args", {}).get("imgsz", 640) if isinstance(getattr(module, "args", {}), dict) else 640
    if type(module).__name__ == "ClassificationModel":
        return 224
    return size if isinstance(size, int) else int(size[0])


def _huggingface(spec: Spec, given: Sequence[Input]) -> Architecture:
    require("transformers", "hf", f"hf:{spec.name}")
    from exporters.huggingface import architecture_from_config

    return architecture_from_config(Path(spec.name), spec.part, spec.keywords, given)


def _user(spec: Spec, given: Sequence[Input]) -> Architecture:
    import torch

    module_name, function = spec.source, spec.name
    factory = _factory(module_name, function)
    module = _call(factory, spec)
    if not isinstance(module, torch.nn.Module):
        raise GpusqError(
            f"{module_name}:{function} returns a {type(module).__name__}",
            hint="name a function that returns a module",
        )
    order = list(inspect.signature(module.forward).parameters)
    examples = getattr(module, "example_inputs", ())
    return Architecture(module, resolve_inputs(_like(examples, order), given, f"{module_name}:{function}", order))


def _factory(module_name: str, function: str) -> Callable[..., Any]:
    try:
        with working_directory_importable():
            found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise GpusqError(
            f"there is no module {error.name!r}",
            hint="run gpusq where your code lies, or install it; known sources are timm, torchvision, hf, ultralytics",
        ) from error
    factory = getattr(found, function, None)
    if not callable(factory):
        public = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
        raise unknown_name(function, public, module_name)
    result: Callable[..., Any] = factory
    return result


def _like(examples: Any, order: Sequence[str]) -> list[Input]:
    import torch

    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    named = examples if isinstance(examples, Mapping) else dict(zip(order, examples, strict=False))
    found = []
    for name, example in named.items():
        dtype = str(getattr(example, "dtype", "")).removeprefix("torch.")
        if dtype not in DTYPES:
            raise GpusqError(
                f"example_inputs of the model: {name!r} is no tensor that a graph can take",
                hint=f"give tensors of {', '.join(DTYPES)}, in the order of forward or by name",
            )
        found.append(Input(name, tuple(example.shape), dtype))
    return found


def _image(channels: int, height: int, width: int, name: str = "image") -> Input:
    return Input(name, (1, channels, height, width))


def _call(factory: Callable[..., Any], spec: Spec, *args: Any, **fixed: Any) -> Any:
    try:
        return factory(*args, **{**fixed, **spec.keywords})
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in spec.keywords.items())
        raise GpusqError(
            f"{spec.source}:{spec.name} cannot be built{f' with {given}' if given else ''}: {error}",
            hint="what follows '?' are keyword arguments of its factory",
        ) from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _classes_of_head(module: torch.nn.Module, shapes: Shapes) -> int | None:
    """The number of classes in the checkpoint, if that is all in which the module and `shapes` differ."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    misfits = [(own[name], shape) for name, shape in shapes.items() if name in own and own[name] != shape]
    first = {(mine[:1], theirs[:1]) for mine, theirs in misfits}
    if len(first) != 1 or any(mine[1:] != theirs[1:] for mine, theirs in misfits):
        return None
    ((mine, theirs),) = first
    return theirs[0] if theirs and len(mine) == len(theirs) else None


_BUILDERS: Mapping[str, Callable[[Spec, Sequence[Input]], Architecture]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
    "ultralytics": _ultralytics,
}
_CLASSES = {"timm": "num_classes", "torchvision": "num_classes", "hf": "num_labels"}
