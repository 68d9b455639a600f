"""torch's own layer in place of a library's, with the same hyperparameters and other values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

WEIGHT = "weight"
_HYPERPARAMETERS = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


def plain_layer(module: nn.Module, kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a `kind`, such as nn.Conv2d, that is what `module` is but for its parameters, which are float32."""
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    for attribute in _HYPERPARAMETERS:
        if hasattr(module, attribute):
            setattr(plain, attribute, getattr(module, attribute))
    set_parameters(plain, {WEIGHT: weight} if kind is nn.Embedding else {WEIGHT: weight, "bias": bias})
    return plain


def set_parameters(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Give `module` these parameters, in float32."""
    for name, tensor in tensors.items():
        parameter = None if tensor is None else nn.Parameter(tensor.detach().float().clone(), requires_grad=False)
        module.register_parameter(name, parameter)
