"""Weights and an architecture → a student: masks folded, trained scales taken out, tensors put in their places.

The state dict passes through the same steps whatever wrote it:

    tensors ─► masks folded ─► scales taken out ─► architecture built ─► loaded ─► library's quantizers replaced
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exporters.architecture import Architecture, build_architecture, parse_spec, require, ultralytics_architecture
from exporters.dense import is_torchao
from exporters.masks import FoldedMask, fold_masks
from exporters.quantized_modules.plain import is_quantized, plain
from exporters.quantizer import Place, Quantizer
from exporters.scales import take_scales
from exporters.scales.factors import multiply_inputs
from exporters.signature import Input, with_dynamic
from exporters.student import ModuleStudent
from exporters.tensors import Tensors, check_finite
from profiles.errors import GpusqError

SHOWN = 5
# Buffers that libraries compute when a model is built, and older releases stored.
_COMPUTED = ("num_batches_tracked", "position_ids", "inv_freq", "relative_position_index", "attn_mask")


def student_of_weights(
    tensors: Tensors,
    spec: str,
    *,
    source: Path,
    kind: str,
    inputs: Sequence[Input] = (),
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> ModuleStudent:
    """Put `tensors` into the architecture that `spec` names.

    Raises:
        GpusqError: they do not fit it, a mask or a scale is unsound, or a weight is NaN or infinite.
    """
    ours = {name: tensor for name, tensor in tensors.state.items() if not is_torchao(tensor)}
    masked = fold_masks(ours)
    check_finite(masked.state, str(source))  # a weight under a mask may have been NaN
    taken = take_scales(masked.state, {**tensors.metadata, **(metadata or {})})
    built, loaded = _built(spec, taken.state, inputs)
    quantizers: Mapping[Place, Quantizer] = taken.quantizers
    notes = (*tensors.notes, *map(_told, masked.folded), *taken.notes, *built.notes)
    if len(ours) < len(tensors.state) or is_quantized(built.weights_module):
        _load_as_its_library_does(built.weights_module, tensors.state, spec)
        found = plain(built.weights_module)
        built, quantizers, notes = _with_module(built, found.module), found.quantizers, (*notes, *found.notes)
    else:
        if not loaded:
            load_state(built.weights_module, taken.state, spec)
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
    tensors: Tensors, *, kind: str, inputs: Sequence[Input] = (), dynamic: Sequence[str] = ()
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
    found = plain(built.module)
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


def load_state(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `module` in float32; raises GpusqError, naming the tensors, where the two do not fit."""
    expected = module.state_dict()
    tied = _tied(module)
    missing = [key for key in expected if key not in state and not _computed(key) and key not in tied]
    unexpected = [key for key in state if key not in expected and not _computed(key)]
    misshapen = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    wrong = [f"{key} is missing, {list(expected[key].shape)} expected" for key in missing]
    wrong += [f"{key} {list(state[key].shape)} is unexpected" for key in unexpected]
    wrong += [f"{key} is {list(state[key].shape)}, {list(expected[key].shape)} expected" for key in misshapen]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise GpusqError(
            f"the tensors do not fit {name}: {'; '.join(wrong[:SHOWN])}{more}",
            hint="name the architecture that was trained, with its options: --model 'timm:NAME?num_classes=10'",
        )
    module.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)
    module.float()


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


def _tied(module: nn.Module) -> frozenset[str]:
    """The names that share their tensor with another one: a file may hold any one of them."""
    owners: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(key)
    return frozenset(key for keys in owners.values() if len(keys) > 1 for key in keys)


def _computed(key: str) -> bool:
    return key.rpartition(".")[2] in _COMPUTED


def _with_module(built: Architecture, module: nn.Module) -> Architecture:
    """`built` with another module at its root."""
    if not built.root:
        return Architecture(module, built.inputs, built.outputs, built.root, built.notes)
    parent, _, child = built.root.rpartition(".")
    setattr(built.module.get_submodule(parent), child, module)
    return built


def _told(folded: FoldedMask) -> str:
    return f"mask of {folded.name} folded ({folded.kind}): {100 * folded.zeros:.1f} % zeros"
