"""Open a checkpoint by its content, never by its ending, and run no code that it brings along unless that is asked for.

| what is found | what it becomes |
|---|---|
| the project's own format | a module of the `students` package with its trained scales |
| weights: safetensors, torch.save, sharded | the architecture of `--model`, masks folded and scales taken out |
| a Hugging Face folder | the model of its config.json with these weights |
| a program of torch.export (.pt2) | itself, its quantize and dequantize operators as Q/DQ |
| an ONNX file | itself, cleaned, its Q/DQ made symmetric |
| a pickled module (torch.save(model), Ultralytics) | that module, with `--trust-code` only |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.kinds import Kind, kind_of, read_json
from exporters.signature import Input
from exporters.student import ModuleStudent, Student
from profiles.errors import GpusqError

if TYPE_CHECKING:
    from exporters.scales import Hints

WORDS: dict[str, str] = {
    "safetensors": "safetensors file",
    "torch-zip": "torch.save file",
    "torch-legacy": "torch.save file of the older form",
    "hf-folder": "Hugging Face folder",
    "sharded": "sharded checkpoint",
    "folder": "folder with weights",
    "pt2": "torch.export program",
    "onnx": "ONNX file",
}


@dataclass(frozen=True)
class LoadOptions:
    """What the user says about a checkpoint that it does not say itself.

    Attributes:
        model: the architecture, `timm:deit_small_patch16_224` or `package.module:factory`.
        inputs: what the model takes, where that cannot be found out.
        dynamic: axes that may vary, each as NAME:AXIS.
        trust_code: whether code that the checkpoint brings along may run.
        drop_dynamic: leave activations float whose scales their library computes while the network runs.
        bits: of the integers, 1 to 8, where the checkpoint does not say.
    """

    model: str | None = None
    inputs: tuple[Input, ...] = ()
    dynamic: tuple[str, ...] = ()
    trust_code: bool = False
    drop_dynamic: bool = False
    bits: int | None = None


def load_student(path: Path, options: LoadOptions | None = None) -> Student:
    """Return the student in `path`.

    Raises:
        GpusqError: there is no such file, it is damaged or holds no student, or more must be said about it.
    """
    options = options or LoadOptions()
    if not path.exists():
        raise GpusqError(f"no such file: {path}", hint="give the path of a trained student")
    kind = kind_of(path)
    if kind == "onnx":
        return _graph(path, options)
    if kind == "pt2":
        return _program(path, options)
    return _weights(path, kind, options)


def _weights(path: Path, kind: Kind, options: LoadOptions) -> Student:
    from exporters.student_file import FORMAT, read_student
    from exporters.tensors import read_tensors

    tensors = read_tensors(path, trust_code=options.trust_code)
    if tensors.metadata.get("format") == FORMAT:
        from exporters.torch_student import to_student

        return to_student(read_student(path))
    from exporters import weights

    words, hints = WORDS.get(kind, kind), hints_of(options)
    if tensors.module is not None:
        return weights.student_of_module(
            tensors, kind=words, inputs=options.inputs, dynamic=options.dynamic, hints=hints
        )
    spec = options.model or (f"hf:{path}" if kind == "hf-folder" else None)
    if spec is None:
        raise GpusqError(
            f"{path} holds weights, and nothing says of which architecture",
            hint="name it: --model timm:NAME, torchvision:NAME, hf:DIR or package.module:factory",
        )
    return weights.student_of_weights(
        tensors,
        spec,
        source=path,
        kind=words,
        inputs=options.inputs,
        dynamic=options.dynamic,
        metadata=config_of(path),
        hints=hints,
    )


def hints_of(options: LoadOptions) -> Hints:
    """What the user decided about scales."""
    from exporters.scales import Hints

    return Hints(options.drop_dynamic, options.bits)


def config_of(path: Path) -> dict[str, Any]:
    """The config.json in the folder `path`, or beside the file `path`; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    content = read_json(file) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def _graph(path: Path, options: LoadOptions) -> Student:
    from exporters.graph_student import read_graph

    _refuse_architecture(path, options)
    return read_graph(path)


def _program(path: Path, options: LoadOptions) -> Student:
    from exporters.program import load_program
    from exporters.quantized_modules.plain_program import plain_program

    _refuse_architecture(path, options)
    program = load_program(path)
    found = plain_program(program.program, drop_dynamic=options.drop_dynamic)
    return ModuleStudent(
        module=found.module,
        inputs=program.inputs,
        model=path.name,
        kind=WORDS["pt2"],
        quantizers=found.quantizers,
        notes=found.notes,
    )


def _refuse_architecture(path: Path, options: LoadOptions) -> None:
    if options.model or options.inputs or options.dynamic or options.bits:
        raise GpusqError(
            f"{path} is a whole model: it names its own inputs, axes and bits",
            hint="leave out --model, --input, --dynamic and --bits",
        )
