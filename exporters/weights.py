"""Weights and an architecture → a student: masks folded, trained scales taken out, tensors put in their places.

The state dict passes through the same steps whatever wrote it:

    tensors ─► masks folded ─► scales taken out ─► architecture built ─► loaded ─► library's quantizers replaced
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exporters.architecture import Architecture, build_architecture, parse_spec, require, ultralytics_architecture
from exporters.dense import is_torchao
from exporters.load_state import load_state
from exporters.masks import FoldedMask, MaskedState, fold_masks
from exporters.quantized_modules.plain import is_quantized, plain
from exporters.quantizer import Place, Quantizer
from exporters.scales import Hints, TakenScales, take_scales
from exporters.scales.factors import multiply_inputs
from exporters.signature import Input, with_dynamic
from exporters.student import ModuleStudent
from exporters.tensors import Tensors, check_finite
from profiles.errors import GpusqError

_ARCHITECTURE = "name the architecture that was trained, with its options: --model 'timm:NAME?num_classes=10'"


@dataclass(frozen=True)
class TakenApart:
    """The tensors of a checkpoint, taken apart without its model.

    Attributes:
        masked: the plain weights, and the masks that were folded into them.
        taken: these weights without their scales, and the scales.
        of_torchao: torchao's own tensors, whose scales only its modules tell.
    """

    masked: MaskedState
    taken: TakenScales
    of_torchao: Mapping[str, Tensor]


def take_apart(tensors: Tensors, metadata: Mapping[str, Any], hints: Hints | None = None) -> TakenApart:
    """Fold the masks of `tensors` and take out their scales; `metadata` is what lies beside the file.

    Raises:
        GpusqError: a mask or a scale is unsound.
    """
    of_torchao = {name: tensor for name, tensor in tensors.state.items() if is_torchao(tensor)}
    masked = fold_masks({name: tensor for name, tensor in tensors.state.items() if name not in of_torchao})
    return TakenApart(masked, take_scales(masked.state, {**tensors.metadata, **metadata}, hints), of_torchao)


def student_of_weights(
    tensors: Tensors,
    spec: str,
    *,
    source: Path,
    kind: str,
    inputs: Sequence[Input] = (),
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    hints: Hints | None = None,
) -> ModuleStudent:
    """Put `tensors` into the architecture that `spec` names.

    Raises:
        GpusqError: they do not fit it, a mask or a scale is unsound, or a weight is NaN or infinite.
    """
    hints = hints or Hints()
    plain_weights = take_apart(tensors, metadata or {}, hints)
    taken = plain_weights.taken
    check_finite(plain_weights.masked.state, str(source))  # a weight under a mask may have been NaN
    built, loaded = _built(spec, taken.state, inputs)
    quantizers: Mapping[Place, Quantizer] = taken.quantizers
    notes = (*tensors.notes, *map(_told, plain_weights.masked.folded), *taken.notes, *built.notes)
    if plain_weights.of_torchao or is_quantized(built.weights_module):
        _load_as_its_library_does(built.weights_module, tensors.state, spec)
        found = plain(built.weights_module, drop_dynamic=hints.drop_dynamic)
        built, quantizers, notes = _with_module(built, found.module), found.quantizers, (*notes, *found.notes)
    else:
        if not loaded:
            load_state(built.weights_module, taken.state, spec, _ARCHITECTURE)
        multiply_inputs(built.weights_module, taken.factors)
    return ModuleStudent(
        module=built.module.eval(),
        inputs=with_dynamic(built.inputs, dynamic),
        model=spec,
        kind=", ".join(part for part in (kind, taken.kind) if part),
        outputs=built.outputs,
        quantizers=quantizers,
        notes=notes,
        root=built.root,
    )


def _built(spec: str, state: Mapping[str, Tensor], inputs: Sequence[Input]) -> tuple[Architecture, bool]:
    """The architecture, and whether it has its weights: transformers puts them in itself, since it renames many."""
    parsed = parse_spec(spec)
    if parsed.source == "hf" and not parsed.keywords:
        require("transformers", "hf", spec)
        from exporters.huggingface import architecture_from_state

        return architecture_from_state(Path(parsed.name), state, parsed.part, inputs), True
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return build_architecture(spec, shapes=shapes, inputs=inputs), False


def student_of_module(
    tensors: Tensors,
    *,
    kind: str,
    inputs: Sequence[Input] = (),
    dynamic: Sequence[str] = (),
    hints: Hints | None = None,
) -> ModuleStudent:
    """The student that a file brought as a whole module, whose code was trusted."""
    module = tensors.module
    assert module is not None
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith("ultralytics."):
        built = ultralytics_architecture(module.float(), inputs)
    elif inputs:
        built = Architecture(module.float(), tuple(inputs))
    else:
        raise GpusqError(f"nothing tells what {name} takes", hint="give it as --input NAME=1x3x224x224")
    found = plain(built.module, drop_dynamic=hints is not None and hints.drop_dynamic)
    return ModuleStudent(
        module=found.module,
        inputs=with_dynamic(built.inputs, dynamic),
        model=name,
        kind=kind,
        outputs=built.outputs,
        quantizers=found.quantizers,
        notes=(*tensors.notes, *built.notes, *found.notes),
        root=built.root,
    )


def _load_as_its_library_does(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into a library's own modules: they rename, resize and drop tensors while they load."""
    tensors = any(map(is_torchao, state.values()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.load_state_dict(dict(state), assign=tensors)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise GpusqError(
            f"the tensors do not fit {name}: {reason[:300]}",
            hint="the factory must prepare the model for quantization as it was when the checkpoint was saved",
        ) from error


def _with_module(built: Architecture, module: nn.Module) -> Architecture:
    """`built` with another module at its root."""
    if not built.root:
        return Architecture(module, built.inputs, built.outputs, built.root, built.notes)
    parent, _, child = built.root.rpartition(".")
    setattr(built.module.get_submodule(parent), child, module)
    return built


def _told(folded: FoldedMask) -> str:
    return f"mask of {folded.name} folded ({folded.kind}): {100 * folded.zeros:.1f} % zeros"
