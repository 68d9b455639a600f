"""Read the tensors of a checkpoint of any kind, safely: name → dense tensor, as stored.

| source | how |
|---|---|
| safetensors | mapped, tensor by tensor |
| torch.save, zip or the older stream | `weights_only`; zip files mapped; the state dict found by `exporters.nesting` |
| sharded: an index JSON, or a folder that holds one | the shards one after the other, each as above |
| a folder with one weights file | that file; safetensors before pickles |

Sparse tensors come back dense (`exporters.dense`). Masks are left as they are: `exporters.masks` folds them.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from exporters.dense import to_dense
from exporters.kinds import INDEX_KEY, Kind, index_files, kind_of, read_json
from exporters.nesting import WRAPPERS, find_weights, plain_items
from exporters.parts import weight_map
from exporters.safe_pickle import ALL_OF_IT, NOT_RUN, load_pickle, wanted_globals
from profiles.errors import GpusqError

WEIGHTS: tuple[Kind, ...] = ("safetensors", "torch-zip", "torch-legacy")
SAVE_WEIGHTS = "save the weights only: torch.save(model.state_dict(), path)"
COMMON_NAMES = ("model.safetensors", "pytorch_model.bin")
_INSTEAD: dict[Kind, tuple[str, str]] = {
    "torchscript": ("is a TorchScript archive", "save the eager module's state_dict(), or export it to ONNX"),
    "pt2": ("is a program of torch.export", "it is a whole model already: no separate weights are read from it"),
    "onnx": ("is an ONNX model", "it is a whole model already: no separate weights are read from it"),
    "torch-tar": ("is a torch.save file of before 2017", "load it with an old torch and save it again"),
    "json": (f"is JSON without {INDEX_KEY!r}", "give the weights, or the index of the shards"),
    "zip": ("is a zip file, but not one of torch.save", "unpack it and give what is in it"),
    "gguf": ("is a GGUF file", "give the checkpoint that it was made from"),
    "hdf5": ("is an HDF5 file, as Keras writes it", "only PyTorch's checkpoints and ONNX are read"),
    "html": ("is a web page", "the download went wrong: fetch the file itself"),
    "lfs-pointer": ("is a Git LFS pointer, not the file it points to", "run 'git lfs pull' where it came from"),
    "empty": ("is empty", "copy or download it again"),
    "unknown": ("is no checkpoint that is known here", "give a .safetensors, a torch.save file, or their index JSON"),
}


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds.

    `state` is name → dense CPU tensor with the stored dtype and shape, mapped from the file where that is possible.
    `notes` tells which reading was taken where two were possible. `metadata` is the plain data beside the weights.
    `module` is the whole module that a pickle held, only ever there when its code was trusted.
    """

    state: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    module: torch.nn.Module | None = None


def read_tensors(path: str | Path, *, trust_code: bool = False) -> Tensors:
    """The tensors of the checkpoint at `path`, whatever its kind.

    No code of it is run unless `trust_code`; then a whole module in a pickle is taken too, as `Tensors.module`.
    Raises GpusqError, naming the file, the shard, the tensor or the class at fault, where it cannot be read.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in ("hf-folder", "sharded", "folder"):
        return _read_folder(path, trust_code) if path.is_dir() else _read_sharded(path, trust_code)
    if kind in WEIGHTS:
        return _read_file(path, kind, trust_code)
    if kind == "pickle":
        raise _plain_pickle(path)
    if kind == "zip" and not zipfile.is_zipfile(path):
        raise GpusqError(f"{path} is a zip file that was cut short", hint=ALL_OF_IT)
    what, hint = _INSTEAD[kind]
    raise GpusqError(f"{path} {what}", hint=hint)


def check_finite(state: Mapping[str, torch.Tensor], source: str = "the checkpoint") -> None:
    """Raise GpusqError, naming the first such tensors, where `state` holds NaN or infinity.

    A tensor of nothing but 0 and −∞ passes: it is an additive attention mask.
    """
    bad = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        names = ", ".join(map(repr, bad[:4])) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        raise GpusqError(
            f"{source}: NaN or infinity in {names}",
            hint="the training diverged: take the last checkpoint whose loss was finite",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # float8 has no aminmax
    least, most = torch.aminmax(tensor)  # NaN wins both, and nothing of the tensor's size is allocated
    if torch.isfinite(least) and torch.isfinite(most):
        return True
    return bool(most == 0) and bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _read_folder(folder: Path, trust_code: bool) -> Tensors:
    chosen, others = _weights_in(folder)
    tensors = read_tensors(chosen, trust_code=trust_code)
    note = f"read {chosen.name}" + (f", not {', '.join(path.name for path in others)}" if others else "")
    return Tensors(tensors.state, (note, *tensors.notes), tensors.metadata, tensors.module)


def _weights_in(folder: Path) -> tuple[Path, list[Path]]:
    """The index or weights file to read in `folder`, and those passed over."""
    indexes = index_files(folder)
    shards = {str(name) for index in indexes for name in weight_map(index).values()}
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in shards]
    kinds = {path: kind_of(path) for path in files}
    for wanted in (["safetensors"], ["torch-zip", "torch-legacy"]):
        kind_indexes = [i for i in indexes if (".safetensors." in i.name) == (wanted == ["safetensors"])]
        found = [path for path in files if kinds[path] in wanted]
        named = [path for path in found if path.name in COMMON_NAMES]
        for choice in (kind_indexes, named, found):
            if len(choice) == 1:
                rest = [path for path in (*indexes, *files) if path != choice[0] and kinds.get(path) in WEIGHTS]
                return choice[0], rest
        if found or kind_indexes:
            names = ", ".join(path.name for path in (kind_indexes or found)[:8])
            raise GpusqError(f"{folder} holds several checkpoints: {names}", hint="give the path of the one you mean")
    raise GpusqError(f"{folder} holds no weights file", hint="give a folder with model.safetensors or its index")


def _read_file(path: Path, kind: Kind, trust_code: bool) -> Tensors:
    if kind == "safetensors":
        return _read_safetensors(path)
    tree = load_pickle(path, kind, trust_code=trust_code)
    if trust_code and (found := _module_in(tree)) is not None:
        return _from_module(path, tree, *found)
    state, notes, beside = find_weights(path, tree)
    return Tensors({name: _dense(path, name, tensor) for name, tensor in state.items()}, tuple(notes), beside)


def _from_module(path: Path, tree: object, where: str, module: torch.nn.Module) -> Tensors:
    state, notes, _ = find_weights(path, dict(module.state_dict()))
    note = f"took the whole module {type(module).__name__}" + (f" in {where!r}" if where else "")
    beside = plain_items(tree) if isinstance(tree, Mapping) else {}
    dense = {name: _dense(path, name, tensor) for name, tensor in state.items()}
    return Tensors(dense, (note, *notes), beside, module)


def _module_in(tree: object) -> tuple[str, torch.nn.Module] | None:
    if isinstance(tree, torch.nn.Module):
        return "", tree
    if isinstance(tree, Mapping):
        for key in WRAPPERS:
            if isinstance(tree.get(key), torch.nn.Module):
                return key, tree[key]
    return None


def _dense(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    try:
        return to_dense(name, tensor)
    except GpusqError as error:
        raise GpusqError(f"{path}: {error.message}", hint=error.hint) from error


def _plain_pickle(path: Path) -> GpusqError:
    wanted = next(wanted_globals(path.read_bytes()), None)
    asks = f", and asks for {wanted!r}" if wanted else ""
    return GpusqError(f"{path} is a pickle, but not one of torch.save{asks}{NOT_RUN}", hint=SAVE_WEIGHTS)


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
            metadata = dict(file.metadata() or {})
    except Exception as error:  # SafetensorError for the header; RuntimeError, TypeError where torch lacks the dtype
        raise GpusqError(f"{path} {_wrong_with_safetensors(path, error)}", hint=ALL_OF_IT) from error
    if not state:
        raise GpusqError(f"{path} holds no tensors", hint="save model.state_dict()")
    return Tensors({name: _dense(path, name, tensor) for name, tensor in state.items()}, (), metadata)


def _wrong_with_safetensors(path: Path, error: Exception) -> str:
    """Which bytes are missing, where that can be told; else the library's words."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        header = file.read(min(length, 100_000_000))
    size = path.stat().st_size
    if len(header) < length:
        return f"is cut short: {8 + length - size} bytes of its header are missing"
    missing = 8 + length + _data_end(header) - size
    if missing > 0:
        return f"is cut short: {missing} of its {size + missing} bytes are missing"
    return f"is not a sound safetensors file: {str(error).partition(chr(10))[0]}"


def _data_end(header: bytes) -> int:
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max((end for end in ends if isinstance(end, int)), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def _read_sharded(index: Path, trust_code: bool) -> Tensors:
    indexed = weight_map(index)
    shards = sorted(set(indexed.values()))
    _check_shards(index, shards)
    state: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    for shard in shards:
        part = read_tensors(index.parent / shard, trust_code=trust_code)
        notes += [f"{shard}: {note}" for note in part.notes]
        _check_indexed(index, shard, indexed, part.state)
        for name, tensor in part.state.items():
            if name in state and not same_bits(state[name], tensor):
                raise GpusqError(
                    f"{index}: tensor {name!r} differs between {origin[name]} and {shard}",
                    hint="the shards are of two checkpoints: download all of one",
                )
            state.setdefault(name, tensor)
            origin.setdefault(name, shard)
    if extra := [name for name in state if name not in indexed]:
        notes.append(f"{len(extra)} tensors that the index does not name were read too, {extra[0]!r} first")
    return Tensors(state, tuple(notes), _index_metadata(index))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (NaN equals NaN, −0 is not 0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.numel() == 0:
        return True
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _index_metadata(index: Path) -> dict[str, Any]:
    content = read_json(index)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return dict(metadata) if isinstance(metadata, dict) else {}


def _check_shards(index: Path, shards: Iterable[str]) -> None:
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise GpusqError(
            f"{index}: shards missing: {', '.join(missing[:4])}{more}", hint="download them into the same folder"
        )
    for shard in shards:
        if (kind := kind_of(index.parent / shard)) not in WEIGHTS:
            raise GpusqError(f"{index}: shard {shard} is no weights file ({kind})", hint="download it again")


def _check_indexed(index: Path, shard: str, indexed: Mapping[str, str], state: Mapping[str, object]) -> None:
    lacking = [name for name, where in indexed.items() if where == shard and name not in state]
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        raise GpusqError(
            f"{index}: shard {shard} lacks tensor {lacking[0]!r}{more}",
            hint="the index and the shards are of two checkpoints: download all of one",
        )
