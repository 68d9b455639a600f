"""A module of a quantization library → the plain float module and the quantizers that `attach` takes.

The module is alive: the user's factory built it and its state dict is loaded. Brevitas, torch.ao.quantization and
torchao keep trained scales in modules and tensor subclasses of their own; each of these is replaced:

    QuantLinear(weight_quant, input_quant)  →  nn.Linear, its weight the integers · scale
                                               Place(name, "weight"), Place(name, "input")
    FakeQuantize, QuantIdentity             →  nn.Identity, Place(name, "output")

A weight is what the library computes with, so that its integers are the library's own. What is not known is refused by
name: a quantizer that goes unseen would be a student silently less quantized than it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import prune

from exporters.quantized_modules import brevitas_modules, torch_ao_modules, torchao_modules
from exporters.quantized_modules.findings import Findings, described
from exporters.quantized_modules.torch_ao_graph import plain_graph
from exporters.quantizer import Place, Quantizer
from profiles.errors import GpusqError

# What a library makes of one of its modules: a plain one, the module itself where only its children are to be replaced,
# or None for one that it does not know.
Replace = Callable[[nn.Module, str, Findings], "nn.Module | None"]

# By the package that a class comes from; the first that fits.
_LIBRARIES: tuple[tuple[str, Replace], ...] = (
    ("brevitas.", brevitas_modules.replaced),
    ("torchao.quantization.pt2e.", torch_ao_modules.replaced),
    ("torchao.", torchao_modules.replaced),
    ("torch.ao.", torch_ao_modules.replaced),
)


@dataclass(frozen=True)
class PlainModule:
    """What `plain` returns.

    Attributes:
        module: plain, in eval mode.
        quantizers: the trained scales by place.
        notes: what was folded, kept float or dropped, one line each.
    """

    module: nn.Module
    quantizers: Mapping[Place, Quantizer]
    notes: tuple[str, ...] = ()


def plain(module: nn.Module, *, drop_dynamic: bool = False) -> PlainModule:
    """Return `module` without its library's quantizers, which are taken out in place, and these quantizers.

    Args:
        module: built by the user's factory, with its state dict loaded; used up by the call.
        drop_dynamic: leave dynamically quantized activations float, and note it, instead of refusing them.

    Raises:
        GpusqError: a quantizer is asymmetric and folds into no int8 exactly, its scale is not positive, it is dynamic,
            or a module of a library is not known; the message names the module.
    """
    found = Findings(drop_dynamic)
    module = _walk(module.eval(), "", found, {})
    return PlainModule(module.eval(), found.quantizers, tuple(found.notes))


def is_quantized(module: nn.Module) -> bool:
    """Whether any module or parameter in `module` belongs to a library that `plain` knows."""
    return any(_library(part) is not None or torchao_modules.has_tensors(part) for part in module.modules())


def _walk(module: nn.Module, name: str, found: Findings, done: dict[int, nn.Module]) -> nn.Module:
    """Replace `module` and what is in it; a module that sits at several places stays one."""
    if id(module) in done:
        return done[id(module)]
    torch_ao_modules.take_output_quantizer(module, name, found)
    replaced = _replace(module, name, found)
    done[id(module)] = replaced
    done[id(replaced)] = replaced
    for child_name, child in list(replaced._modules.items()):
        if child is not None:
            replaced._modules[child_name] = _walk(child, f"{name}.{child_name}" if name else child_name, found, done)
    return plain_graph(replaced, name, found)


def _replace(module: nn.Module, name: str, found: Findings) -> nn.Module:
    library = _library(module)
    if library is None:
        torchao_modules.take_tensors(module, name, found)
        return module
    _fold_masks(module, name, found)
    replaced = library(module, name, found)
    if replaced is None:
        raise GpusqError(
            f"{name or 'the model'!r} is a {described(module)}, whose quantization is not known here",
            hint="replace it with a module that has scales of its own, or export its float version",
        )
    if replaced is not module and (module._forward_hooks or module._forward_pre_hooks):
        raise GpusqError(
            f"{name or 'the model'!r} has a hook of its own, which would be lost with its {described(module)}",
            hint="remove the hook before the export",
        )
    return replaced


def _fold_masks(module: nn.Module, name: str, found: Findings) -> None:
    """Make the masks of torch.nn.utils.prune part of the parameters that they are applied to."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            tensor = str(hook._tensor_name)
            prune.remove(module, tensor)  # type: ignore[no-untyped-call]
            found.notes.append(f"the pruning mask of {name}.{tensor} is folded into it")


def _library(module: nn.Module) -> Replace | None:
    for kind in type(module).__mro__:
        for prefix, library in _LIBRARIES:
            if f"{kind.__module__}.".startswith(prefix):
                return library
    return None
