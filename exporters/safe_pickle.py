"""Load what torch.save wrote without running any code of it.

`torch.load(weights_only=True)` builds nothing but tensors and plain containers; every other class or function that
the pickle asks for ends the loading before it is touched. The list of exceptions is short, is the same whatever
libraries are imported (torchao, for one, extends torch's global list), and holds inert stand-ins defined here, never
the libraries' own classes:

- numpy's scalars, which end up beside the weights as accuracies and losses, become Python numbers;
- argparse.Namespace and pathlib's paths, the training script's arguments, become a dict and a str;
- a defaultdict, in which torch.ao.pruning's sparsifiers keep their masks, becomes a dict;
- packed sparse tensors (`exporters.dense`) become their parts.
"""

from __future__ import annotations

import importlib
import io
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from exporters.dense import STAND_INS
from exporters.kinds import Kind
from profiles.errors import GpusqError

ALL_OF_IT = "copy or download it again; saving was cut short if it is like this at its source too"
NOT_RUN = "; nothing was run"
_TORCHAO = "torchao."
HOW_TO_TRUST = (
    "if you trust its source give --trust-code, which runs the code in it; "
    "else save only the weights: torch.save(model.state_dict(), path)"
)


class DtypeStandIn:
    """numpy.dtype as a pickle describes it: a code, and a state that tells the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.code = state[1] + self.code


def _scalar(dtype: DtypeStandIn, raw: bytes | str) -> object:
    if not isinstance(dtype, DtypeStandIn) or dtype.code.lstrip("<>=|")[:1] not in set("fiubc"):
        raise ValueError("not a number's dtype")
    content = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(content, np.dtype(dtype.code), count=1)[0].item()


class NamespaceStandIn:
    """argparse.Namespace: attributes only."""


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _default_dict(*_: object) -> dict[Any, Any]:
    return {}


def _factory(*_: object) -> None:
    """In the place of `dict` and `list` as a defaultdict's factory; as functions they are not needed."""


Allowed = tuple[Callable[..., Any], str]
PLAIN: tuple[Allowed, ...] = (
    (DtypeStandIn, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (NamespaceStandIn, "argparse.Namespace"),
    (_default_dict, "collections.defaultdict"),
    (_factory, "builtins.dict"),
    (_factory, "builtins.list"),
    (slice, "builtins.slice"),
    (_posix_path, "pathlib.PosixPath"),
    (_windows_path, "pathlib.WindowsPath"),
    (_posix_path, "pathlib._local.PosixPath"),
    (_windows_path, "pathlib._local.WindowsPath"),
)


def load_pickle(path: Path, kind: Kind, *, trust_code: bool = False) -> Any:
    """What torch.save put into `path`, on the CPU; a zip file stays mapped and is read as its tensors are used.

    Raises GpusqError where the file is not whole, or where the pickle asks for a class or function (named) that is no
    plain data. With `trust_code` the pickle is loaded as it wants to be, its code included.
    """
    try:
        try:
            return _load(path, kind, trust_code=trust_code)
        except Exception:
            if not (tensors := _torchao_tensors(path, kind)):
                raise
            return _load(path, kind, trust_code=trust_code, allowed=tensors)
    except GpusqError:
        raise
    except Exception as error:  # a mutilated pickle can raise anything at all, and so can code from a trusted one
        raise _explain(path, kind, error, trust_code) from error


def _load(path: Path, kind: Kind, *, trust_code: bool, allowed: Sequence[Any] = ()) -> Any:
    with warnings.catch_warnings(), _only_safe_globals(allowed):
        warnings.simplefilter("ignore")  # torch's remarks on old storages say nothing to who converts a file
        return torch.load(path, "cpu", weights_only=not trust_code, mmap=True if kind == "torch-zip" else None)


def _torchao_tensors(path: Path, kind: Kind) -> list[Any]:
    """What torchao itself declares safe to load, if the pickle in `path` asks for any of it.

    Raises:
        GpusqError: it does, and torchao is not installed.
    """
    stream = _pickle_stream(path, kind)
    if isinstance(stream, str) or not any(name.startswith(_TORCHAO) for name in wanted_globals(stream)):
        return []
    try:
        importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise GpusqError(
            f"{path} holds tensors of torchao, which does not import: {error}", hint="pip install 'gpusq[torchao]'"
        ) from error
    declared = torch.serialization.get_safe_globals()
    return [known for known in declared if str(getattr(known, "__module__", "")).startswith(_TORCHAO)]


@contextmanager
def _only_safe_globals(allowed: Sequence[Any]) -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*PLAIN, *STAND_INS, *allowed])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _explain(path: Path, kind: Kind, error: Exception, trust_code: bool) -> GpusqError:
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    if trust_code:
        return GpusqError(
            f"{path}: running the code in it failed: {type(error).__name__}: {reason}",
            hint="install the package, in the version, that wrote the file",
        )
    stream = _pickle_stream(path, kind)
    if isinstance(stream, str):
        return GpusqError(f"{path} {stream}", hint=ALL_OF_IT)
    wanted = next((name for name in wanted_globals(stream) if not _allowed(name)), None)
    if wanted is not None:
        return GpusqError(f"{path}: the pickle asks for {wanted!r}, which is no plain data{NOT_RUN}", hint=HOW_TO_TRUST)
    return GpusqError(f"{path} is not a whole torch.save file: {_in_torchs_words(error, reason)}", hint=ALL_OF_IT)


def _in_torchs_words(error: Exception, reason: str) -> str:
    """Torch's own reason without its advice to load the file unsafely."""
    if "Weights only load failed" in reason:
        told = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler error:" in line]
        return told[0].partition("WeightsUnpickler error:")[2].strip()[:200] if told else "the pickle is damaged"
    return reason


def _pickle_stream(path: Path, kind: Kind) -> bytes | str:
    """The bytes of the pickles in the file, or a sentence that says why they cannot be had."""
    if kind != "torch-zip":
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return archive.read(name)
    except zipfile.BadZipFile:
        return f"is cut short: a zip file's directory stands at its end, and its {path.stat().st_size} bytes have none"
    except Exception as error:  # the directory is damaged, in any of the ways a zip file can be
        return f"is a damaged zip file: {str(error).partition(chr(10))[0] or type(error).__name__}"


def wanted_globals(content: bytes) -> Iterator[str]:
    """The classes and functions that the pickles in `content` ask for, "module.name", in order; runs nothing.

    Ends at the first byte that is no pickle.
    """
    stream = io.BytesIO(content)
    try:
        while stream.tell() < len(content):
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".", 1)
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    yield ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # pickletools raises as many kinds as there are ways to damage a pickle
        return


def _allowed(name: str) -> bool:
    stand_ins = {known for _, known in (*PLAIN, *STAND_INS)}
    return name in stand_ins or name in torch._weights_only_unpickler._get_allowed_globals()
