"""Every name that the code takes from TensorRT, cuda-bindings and PyCUDA, read from its own syntax trees.

    python tests/deploy/tensorrt_calls.py > docs/unproven.md

A name is known by the expression before the dot: `config.set_flag(…)` is IBuilderConfig's. Such an expression that is
not in the tables here is an error of the test that uses them, so nothing is overlooked.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from deploy.builder_config import FLAGS, LEVELS, TILINGS  # noqa: E402  found by the line above

BUILDING = ("tensorrt_api", "builder_config", "timing_cache")
RUNNING = ("tensorrt_engine",)
MODULE = ("trt", "api", "self._api")
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser.get_error(0)": "ParserError",
    "config": "IBuilderConfig",
    "config.get_timing_cache()": "ITimingCache",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "dynamic[0]": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
# Called where TensorRT-RTX compiles ahead of time, which TensorRT does not.
AHEAD_OF_TIME = (
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
)
PROGRAMS = ("nvidia-smi", "nvpmodel", "nvcc", "tegrastats", "trtexec")


@dataclass(frozen=True, order=True)
class Use:
    """One use of a name.

    Attributes:
        owner: the class, or "" for the module itself.
        name: the attribute.
        arguments: how many are passed; -1 where it is not called.
    """

    owner: str
    name: str
    arguments: int = -1

    def __str__(self) -> str:
        """As Python writes it."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


@functools.cache
def uses(*files: str) -> list[Use]:
    """The names that modules of `deploy` take from TensorRT, sorted, each once."""
    found = {use for file in files for use in _uses(ast.parse((ROOT / "deploy" / f"{file}.py").read_text()))}
    if "builder_config" in files:
        for owner, names in (
            ("BuilderFlag", FLAGS.values()),
            ("HardwareCompatibilityLevel", LEVELS.values()),
            ("TilingOptimizationLevel", TILINGS.values()),
        ):
            found |= {Use(owner, name) for name in names}
    return sorted(found)


def _uses(tree: ast.AST) -> Iterator[Use]:
    called = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        before = ast.unparse(node.value)
        owner = _owner(before)
        if owner is not None:
            call = called.get(node)
            arguments = -1 if call is None or _is_open(call) else len(call.args) + len(call.keywords)
            yield Use(owner, node.attr, arguments)


def _is_open(call: ast.Call) -> bool:
    return any(isinstance(argument, ast.Starred) for argument in call.args)


def _owner(before: str) -> str | None:
    if before in MODULE:
        return ""
    for module in MODULE:
        if before.startswith(f"{module}.") and "(" not in before:
            return before.removeprefix(f"{module}.")
    return CLASSES.get(before)


def package_uses(file: str, before: tuple[str, ...]) -> list[str]:
    """The attributes in a module of `deploy` behind one of the expressions `before`, sorted, each once."""
    tree = ast.parse((ROOT / "deploy" / f"{file}.py").read_text())
    return sorted(
        {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in before}
    )


def cuda_names() -> list[str]:
    """What is called of cuda.bindings.runtime, but the classes of its enumerators."""
    return [name for name in package_uses("cuda_bindings_api", ("runtime", "self._runtime")) if name != "cudaError_t"]


def pycuda_names() -> list[str]:
    """What is called of pycuda.driver."""
    return package_uses("pycuda_api", ("driver", "self._driver"))


def programs() -> list[str]:
    """The programs of NVIDIA's that are started, with the words that are always given."""
    found = set()
    for path in sorted((ROOT / "deploy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List) and node.elts and isinstance(node.elts[0], ast.Constant):
                words = [str(word.value) for word in node.elts if isinstance(word, ast.Constant)]
                if words[0] in PROGRAMS:
                    found.add(" ".join(words))
    return sorted(found)


def to_markdown() -> str:
    """docs/unproven.md."""
    building, running = uses(*BUILDING), uses(*RUNNING)
    ahead = [use for use in building if _is_ahead(use)]
    build = sorted(
        {str(use) for use in building if use not in ahead and "Runtime" not in use.owner and not _reads(use)}
    )
    load = sorted({str(use) for use in (*running, *(use for use in building if _reads(use)))})
    return "\n".join(
        [
            "# What has never run on NVIDIA hardware",
            "",
            "`python tests/deploy/tensorrt_calls.py` writes this page from the code, and a test compares the two.",
            "Nothing here was ever executed on a GPU, a Jetson or a DLA. What is known of each is said.",
            "",
            "## Building with TensorRT",
            "",
            "Run with `tensorrt_rtx`, which has the same API, on hosts without a GPU, by the tests; with `tensorrt`",
            "never. That the names exist and take so many arguments is checked against NVIDIA's published Python",
            "bindings of TensorRT 11.4.0.106 (`tensorrt-cu13-bindings`), where they are installed; by hand also",
            "against those of 10.16.1.11, and of 10.3.0, which has neither tiling nor SAME_COMPUTE_CAPABILITY: the",
            "code asks before it uses either.",
            "",
            _listed(build),
            "",
            "On `tensorrt_rtx` alone:",
            "",
            _listed(sorted(map(str, ahead))),
            "",
            "## Reading an engine back, and running it",
            "",
            "Never executed: a GPU is needed. The names are checked in the same way; what the code does with buffers,",
            "shapes and graphs is tested with a stand-in in host memory.",
            "",
            _listed(load),
            "",
            "## CUDA",
            "",
            "Through `cuda.bindings.runtime`, whose names are checked where the package is installed:",
            "",
            _listed(cuda_names()),
            "",
            "Through `pycuda.driver`, whose names were compared by hand with the sources of PyCUDA 2026.1:",
            "",
            _listed(pycuda_names()),
            "",
            "## Programs",
            "",
            "Their answers in the tests are texts that others recorded, or a stand-in's:",
            "",
            _listed(programs()),
            "",
            "What trtexec is given is in `gpusq build … --print-trtexec`.",
            "",
        ]
    )


def _is_ahead(use: Use) -> bool:
    return any(str(use).startswith(name) for name in AHEAD_OF_TIME)


def _reads(use: Use) -> bool:
    return use.owner in ("Runtime", "ICudaEngine", "EngineInspector", "LayerInformationFormat") or use.name in (
        "Runtime",
        "LayerInformationFormat",
    )


def _listed(names: list[str]) -> str:
    return "\n".join(f"- `{name}`" for name in names)


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
