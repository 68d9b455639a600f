"""The calls made on TensorRT, held against what NVIDIA publishes: its Python bindings, and `tensorrt_rtx`.

The wheel `tensorrt-cu13-bindings` is the real module `tensorrt`, but for its libraries, of which it asks for nine
functions when it is imported. Those are compiled here, empty, in a second: nothing can be called, and every class can
be read, with the signatures that pybind11 writes. GPUSQ_TENSORRT_BINDINGS names the folder of another unpacked wheel.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tests.deploy.tensorrt_calls import (
    AHEAD_OF_TIME,
    BUILDING,
    CLASSES,
    ROOT,
    RUNNING,
    Use,
    cuda_names,
    programs,
    pycuda_names,
    to_markdown,
    uses,
)

FOLDER = os.environ.get("GPUSQ_TENSORRT_BINDINGS")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
READ = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for owner in sys.argv[2:]:
    part = module
    for name in owner.split(".") if owner else ():
        part = getattr(part, name, None)
    found[owner] = None if part is None else {name: str(getattr(part, name).__doc__ or "") for name in dir(part)}
print(json.dumps(found))
"""
Docs = Mapping[str, Mapping[str, str] | None]


def owners() -> list[str]:
    return sorted({use.owner for use in uses(*BUILDING, *RUNNING)})


def read(module: str, environment: Mapping[str, str]) -> Docs:
    """What each class of `module` has, with its docstrings, read in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-c", READ, module, *owners()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    found: Docs = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Docs:
    if FOLDER is None and importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("NVIDIA's bindings are not installed: pip install --no-deps tensorrt-cu13-bindings")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the empty libraries that the bindings ask for")
    folder = tmp_path_factory.mktemp("libraries")
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    for major in (10, 11):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            library = f"lib{name}.so.{major}"
            words = [
                compiler,
                "-shared",
                "-fPIC",
                "-x",
                "c",
                "-",
                "-o",
                str(folder / library),
                f"-Wl,-soname,{library}",
            ]
            subprocess.run(words, input=source, text=True, check=True)
    return read("tensorrt_bindings", {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": FOLDER or ""})


def takes(doc: str, arguments: int) -> bool:
    """Whether a signature in pybind11's docstring takes so many arguments besides `self`."""
    signatures = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", doc, re.MULTILINE)
    if not signatures or "*args" in signatures[0]:
        signatures = signatures[1:]
    return not signatures or any(_fits(signature, arguments) for signature in signatures)


def _fits(signature: str, arguments: int) -> bool:
    flat = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", signature))
    parameters = [part.strip() for part in flat.split(", ") if ":" in part and not part.strip().startswith("self:")]
    needed = sum("=" not in parameter for parameter in parameters)
    return needed <= arguments <= len(parameters)


def lacking(docs: Docs, *files: str) -> list[str]:
    """The uses that `docs` does not have, or not with so many arguments."""
    found = []
    for use in uses(*files):
        members = docs.get(use.owner)
        if members is None or use.name not in members:
            found.append(str(use))
        elif use.arguments >= 0 and not takes(members[use.name], use.arguments):
            found.append(f"{use} with {use.arguments} arguments")
    return found


def test_everything_that_building_calls_is_in_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="this reads its classes")
    assert lacking(read("tensorrt_rtx", {}), *BUILDING, *RUNNING) == []


def test_everything_but_compiling_ahead_of_time_is_in_tensorrt(bindings: Docs) -> None:
    found = [name for name in lacking(bindings, *BUILDING, *RUNNING) if not name.startswith(AHEAD_OF_TIME)]
    assert found == []


def test_a_call_that_does_not_exist_would_be_found(bindings: Docs) -> None:
    config = bindings["IBuilderConfig"]
    assert config is not None
    assert "set_flags" not in config
    assert takes(config["set_flag"], 1)
    assert not takes(config["set_flag"], 2)
    assert not takes(config["set_memory_pool_limit"], 1)


def test_no_variable_of_these_files_escapes_the_table() -> None:
    """An object of TensorRT under a name that the table lacks would not be checked."""
    for name in (*BUILDING, *RUNNING):
        for node in ast.walk(ast.parse((ROOT / "deploy" / f"{name}.py").read_text())):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and isinstance(node.targets[0], ast.Name)
            ):
                called = ast.unparse(node.value.func)
                variable = node.targets[0].id
                if called.split(".")[0] in {"trt", "builder", "config", "engine", "runtime", "network"}:
                    assert variable in CLASSES or variable == "cache", f"{name}: {variable} = {called}(…)"


def test_cuda_bindings_has_every_name() -> None:
    runtime: Any = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    enumerators = (runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    lacking = [name for name in cuda_names() if not any(hasattr(part, name) for part in (runtime, *enumerators))]
    assert lacking == []


def test_the_page_of_what_is_unproven_is_the_codes() -> None:
    written = (ROOT / "docs" / "unproven.md").read_text(encoding="utf-8")
    assert written == to_markdown(), "run `python tests/deploy/tensorrt_calls.py > docs/unproven.md`"


def test_the_lists_are_not_empty() -> None:
    assert len(uses(*BUILDING)) > 40
    assert Use("IExecutionContext", "execute_async_v3", 1) in uses(*RUNNING)
    assert "cudaGraphLaunch" in cuda_names()
    assert "memcpy_htod_async" in pycuda_names()
    assert any(line.startswith("nvidia-smi") for line in programs())
