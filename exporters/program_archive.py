"""Whether a .pt2 archive holds nothing but a graph and tensors.

`torch.export.load` runs what the archive tells it to: it unpickles example inputs and constants in full, passes
expressions of dynamic shapes to an evaluator, pastes names into generated code, looks operators up by any path below
`torch`, and an archive may bring compiled libraries. Each of these is checked before torch sees the file; pickles are
left to torch's own restricted unpickler, which `restricted_unpickling` makes it use.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiles.errors import GpusqError

_ENTRIES = re.compile(
    r"models/\w+\.json"
    r"|data/(weights|constants)/(\w+_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/\w+\.pt"
    r"|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_library|import_module|loaded_libraries)\w+\.\w+\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|math\.(ceil|floor|sqrt|trunc)"
    r"|torch\.(sym_\w+|_sym_\w+|_check\w*)"
)
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_NAME_KEYS = frozenset({"name", "as_name"})
# Of modules and what they hold: in nn.Sequential they begin with a digit, 0.weight.
_PATH = re.compile(r"[\w.]+")
_PATH_KEYS = frozenset({"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "class_fqn"})
# Their keys are names of values.
_NAMED_VALUES = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"})
_SYMBOL = re.compile(r"[a-z]{1,3}\d+")  # s77, u0
_FUNCTION = re.compile(
    r"Integer|Rational|Add|Mul|Abs|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|CeilToInt|FloorToInt"
    r"|TruncToInt|IntTrueDiv|FloatTrueDiv|ToFloat|Where|Eq|Ne|Le|Lt|Ge|Gt"
)
_EXPRESSION = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.Constant,
    ast.Name,
    ast.Call,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)
_LONGEST_EXPRESSION = 1000
_LARGEST_POWER = 8
_HINT = (
    "export it again with torch.export.save, as tensors and operators alone; other archives may run code when loaded"
)


def check_archive(path: Path) -> None:
    """Raise GpusqError where torch.export.load could run code on the word of the archive in `path`."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive)
    except FileNotFoundError as error:
        raise GpusqError(f"no program file {str(path)!r}", hint="check the path") from error
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, RuntimeError) as error:
        raise GpusqError(f"{path} is not a whole .pt2 archive: {error}", hint="copy or export it again") from error


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Let every torch.load within take tensors only, also where its caller asks for more."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise GpusqError(f"{path} holds two entries of one name", hint=_HINT)
    for name in names:
        inner = name.partition("/")[2]
        if not _ENTRIES.fullmatch(inner):
            raise GpusqError(f"{path} holds {name!r}, which is no tensor and no graph", hint=_HINT)
        if inner.startswith("models/"):
            _check_graph(f"{path}: {name}", _json(path, archive, name))
        elif inner.endswith("_config.json"):
            _check_payloads(path, _json(path, archive, name))
    if not any(name.partition("/")[2].startswith("models/") for name in names):
        raise GpusqError(f"{path} holds no program", hint="write it with torch.export.save")


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise GpusqError(f"{path}: {name} is not JSON: {error}", hint="copy or export it again") from error


def _check_payloads(path: Path, config: Any) -> None:
    payloads = config.get("config") if isinstance(config, dict) else None
    for name, payload in (payloads if isinstance(payloads, dict) else {}).items():
        stored = str(payload.get("path_name", "")) if isinstance(payload, dict) else ""
        if not re.fullmatch(r"(weight|tensor)_\d+", stored):
            raise GpusqError(f"{path}: {name!r} is a pickled object, not a tensor", hint=_HINT)


def _check_graph(where: str, tree: Any) -> None:
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                _check_entry(where, key, value)
                stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)


def _check_entry(where: str, key: str, value: Any) -> None:
    if key == "expr_str" and not _is_arithmetic(str(value)):
        raise GpusqError(f"{where}: {str(value)[:60]!r} is no expression of dynamic shapes", hint=_HINT)
    if key == "target" and isinstance(value, str) and not _OPERATOR.fullmatch(value):
        raise GpusqError(f"{where}: {value[:60]!r} is no operator", hint=_HINT)
    if key in _NAME_KEYS and isinstance(value, str):
        _check_name(where, value)
    if key in _PATH_KEYS and isinstance(value, str):
        _check_name(where, value, _PATH)
    if key in _NAMED_VALUES and isinstance(value, dict):
        for name in value:
            _check_name(where, name)


def _check_name(where: str, name: str, allowed: re.Pattern[str] = _NAME) -> None:
    if name and not allowed.fullmatch(name):
        raise GpusqError(f"{where}: {name[:60]!r} is no name", hint=_HINT)


def _is_arithmetic(expression: str) -> bool:
    if len(expression) > _LONGEST_EXPRESSION:
        return False
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _is_harmless_call(node.func.id, node)
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or bool(_SYMBOL.fullmatch(str(node.value)))
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right)
    return isinstance(node, _EXPRESSION)


def _is_harmless_call(function: str, call: ast.Call) -> bool:
    if function == "Pow":
        return len(call.args) == 2 and not call.keywords and _is_small(call.args[1])
    return function == "Symbol" or (_FUNCTION.fullmatch(function) is not None and not call.keywords)


def _is_small(power: ast.expr) -> bool:
    """Whether a power cannot make a number that never ends: `2`, or sympy's `Integer(2)`."""
    if isinstance(power, ast.Call) and isinstance(power.func, ast.Name) and power.func.id == "Integer":
        (power,) = power.args if len(power.args) == 1 else (power,)
    return isinstance(power, ast.Constant) and power.value in range(_LARGEST_POWER + 1)
