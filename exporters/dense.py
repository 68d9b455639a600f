"""Sparse tensors come back dense, without loss, on a CPU; those which cannot are refused with layer and class.

| stored as | read as |
|---|---|
| torch.sparse COO, CSR, CSC, BSR, BSC | `to_dense`; duplicates of an uncoalesced COO tensor add up |
| SparseSemiStructuredTensorCUTLASS | kept values + 2-bit positions, unpacked by torch's reference conversion |
| SparseSemiStructuredTensorCUSPARSELT | refused: the layout behind the kept values is cuSPARSELt's own, per GPU |
| torchao.sparsity BlockSparseTensor | its BSR parts |
| quantized tensors (quint8, qint8), meta, nested | refused: more than a dense tensor, or less |

A packed tensor is a tensor subclass, and a pickle names its class. What is put in the class's place while loading is
`Parts`, which keeps the attributes and computes nothing: so neither torchao is needed nor any of its code run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from profiles.errors import GpusqError

SAVE_DENSE = "save the dense weight: replace it with its .to_dense() on the machine that packed it, and save again"
# A few bytes can claim to be a tensor of any size (stride 0, or nothing but zeros): what is believed of them.
MOST_EXPANSION = 1000
FREE_BYTES = 64 << 20


class Parts(torch.Tensor):
    """A packed tensor as its pickle describes it: shape and dtype, and the parts as attributes."""

    origin = ""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Only `detach`, which nn.Parameter asks for."""
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{cls.origin} is only carried here, not computed with")
        (source,) = args
        copy: Any = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.device)
        copy.__dict__.update(source.__dict__)
        return copy


class CutlassParts(Parts):
    """In the place of torch.sparse's SparseSemiStructuredTensorCUTLASS."""

    origin = "torch.sparse.semi_structured.SparseSemiStructuredTensorCUTLASS"


class CusparseltParts(Parts):
    """In the place of torch.sparse's SparseSemiStructuredTensorCUSPARSELT."""

    origin = "torch.sparse.semi_structured.SparseSemiStructuredTensorCUSPARSELT"


class BlockParts(Parts):
    """In the place of torchao's BlockSparseTensor."""

    origin = "torchao.sparsity.blocksparse.BlockSparseTensor"


STAND_INS = tuple((parts, parts.origin) for parts in (CutlassParts, CusparseltParts, BlockParts))


def to_dense(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as a plain dense one of its shape and dtype; itself (detached) where it is one already.

    Raises GpusqError, naming the tensor and its class, where that is not possible on a CPU.
    """
    if isinstance(tensor, CutlassParts):
        return _from_cutlass(name, tensor)
    if isinstance(tensor, BlockParts):
        return _from_blocks(name, tensor)
    if is_torchao(tensor):
        return tensor.detach()  # `exporters.quantized_modules` takes it apart, with its scales
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        origin = tensor.origin if isinstance(tensor, Parts) else f"{type(tensor).__module__}.{type(tensor).__name__}"
        raise GpusqError(f"tensor {name!r} is a {origin}, which a CPU cannot unpack", hint=SAVE_DENSE)
    _refuse_special(name, tensor)
    if tensor.layout is torch.strided:
        _check_size(name, tensor, tensor.untyped_storage().nbytes())
        return tensor.detach()
    sparse = _checked(name, tensor.detach())
    values = sparse._values() if sparse.layout is torch.sparse_coo else sparse.values()
    _check_size(name, sparse, values.numel() * values.element_size())
    return sparse.to_dense()


def is_torchao(tensor: object) -> bool:
    """Whether `tensor` is one of torchao's quantized ones."""
    return any(kind.__module__.startswith("torchao.") for kind in type(tensor).__mro__)


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The sparse `tensor` again, its indices checked: torch.load does not, and to_dense writes wherever they point."""
    try:
        if tensor.layout is torch.sparse_coo:
            return torch.sparse_coo_tensor(tensor._indices(), tensor._values(), tensor.shape, check_invariants=True)
        by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        compressed = tensor.crow_indices() if by_row else tensor.ccol_indices()
        plain = tensor.col_indices() if by_row else tensor.row_indices()
        return torch.sparse_compressed_tensor(
            compressed, plain, tensor.values(), tensor.shape, layout=tensor.layout, check_invariants=True
        )
    except (RuntimeError, ValueError, IndexError) as error:
        raise GpusqError(
            f"tensor {name!r} {list(tensor.shape)}: its {tensor.layout} indices do not fit: {_line(error)}",
            hint="the file is damaged: copy or download it again",
        ) from error


def _refuse_special(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_quantized:
        raise GpusqError(
            f"tensor {name!r} is quantized ({str(tensor.dtype).removeprefix('torch.')}): "
            "its scale would be lost in a plain tensor",
            hint="save the trained module before torch's convert(), with its observers or fake-quantizers",
        )
    if tensor.device.type != "cpu":
        raise GpusqError(
            f"tensor {name!r} lies on {tensor.device.type!r}: the file holds no values of it",
            hint="save the module after its weights were loaded",
        )
    if tensor.is_nested:
        raise GpusqError(f"tensor {name!r} is a nested tensor", hint="save its parts as tensors of their own")


def _check_size(name: str, tensor: torch.Tensor, stored_bytes: int) -> None:
    claimed = tensor.numel() * tensor.element_size()
    if claimed > FREE_BYTES + MOST_EXPANSION * stored_bytes:
        raise GpusqError(
            f"tensor {name!r} claims {claimed} bytes ({list(tensor.shape)}) but the file has {stored_bytes} of them",
            hint="the file is damaged; if it is not, save the tensor dense",
        )


def _from_cutlass(name: str, parts: CutlassParts) -> torch.Tensor:
    """Unpack (packed, meta), or their transposed twins where only those were kept."""
    for packed, meta, transposed in (("packed", "meta", False), ("packed_t", "meta_t", True)):
        values, positions = getattr(parts, packed, None), getattr(parts, meta, None)
        if values is None:
            continue
        try:
            dense = sparse_semi_structured_to_dense_cutlass(values, positions)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever the parts are, the conversion was not made for them
            raise _broken(name, parts, _line(error)) from error
        return _of_shape(name, parts, dense.t().contiguous() if transposed else dense)
    raise _broken(name, parts, "it has no packed values")


def _from_blocks(name: str, parts: BlockParts) -> torch.Tensor:
    try:
        crow, col, values = (getattr(parts, "bsr_" + part) for part in ("crow_indices", "col_indices", "values"))
        sparse = torch.sparse_bsr_tensor(crow, col, values, size=parts.shape, check_invariants=True)
    except Exception as error:  # whatever the parts are, they are no block-sparse matrix
        raise _broken(name, parts, _line(error)) from error
    return to_dense(name, sparse)


def _of_shape(name: str, parts: Parts, dense: torch.Tensor) -> torch.Tensor:
    if dense.shape != parts.shape or dense.dtype != parts.dtype:
        raise _broken(name, parts, f"its parts unpack to {dense.dtype} {list(dense.shape)}")
    return dense


def _broken(name: str, parts: Parts, reason: str) -> GpusqError:
    return GpusqError(
        f"tensor {name!r} {list(parts.shape)}: the parts of its {parts.origin} do not fit: {reason}", hint=SAVE_DENSE
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
