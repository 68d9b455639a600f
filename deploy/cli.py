"""The command line: it parses, calls one function, and prints what that returns.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 a gate was missed.
Nothing heavy is imported before the command that needs it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from calibration.method_names import METHODS, PERCENTILE
from exporters.improvement import IMPROVEMENTS
from exporters.placement import PLACEMENTS, measures
from profiles.errors import GpusqError

if TYPE_CHECKING:
    from deploy.progress import Progress

_PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")


class _Commands(click.Group):
    """Turns what a user can mend into two lines and exit code 1; everything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GpusqError as error:
            _fail(ctx, error.message, error.hint, error)
        except OSError as error:
            if error.filename is None:
                raise
            name = os.fsdecode(error.filename)
            _fail(
                ctx,
                f"{name}: {(error.strerror or 'it cannot be used').lower()}",
                "check the path and its rights",
                error,
            )
        return None


def _fail(ctx: click.Context, message: str, hint: str, error: Exception) -> None:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    logging.getLogger(__name__).debug("where it was raised:", exc_info=error)
    ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpusq", message="%(package)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens inside, to stderr.")
def main(verbose: bool) -> None:
    """Ship 2:4-sparse and quantized networks to NVIDIA GPUs.

    A trained checkpoint goes in; for each device profile a verified bundle comes out: ONNX with the trained scales and
    2:4 annotations, an engine, a manifest and a report.
    """
    signal.signal(signal.SIGTERM, _terminate)
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.captureWarnings(capture=True)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
out_option = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the bundles: new, empty, or of bundles."
)


_SCALE_OPTIONS = (
    click.option(
        "--drop-dynamic",
        is_flag=True,
        help="Leave activations float whose scales their library computes at run time; the weights stay quantized.",
    ),
    click.option(
        "--bits",
        type=click.IntRange(1, 8),
        help="Bits of the quantized weights, where the checkpoint does not say.  [default: 8]",
    ),
)
placement_option = click.option(
    "--placement", type=click.Choice(PLACEMENTS), help="Quantizers for what has none; see the documentation."
)
repair_option = click.option(
    "--repair-sparsity", is_flag=True, help="Prune layers that are 2:4 but for a few groups; the error is reported."
)
io_option = click.option(
    "--io-types",
    type=click.Choice(["keep", "graph"]),
    default="keep",
    show_default=True,
    help="Inputs and outputs stay float32, or get the type of the graph, without casts.",
)
improve_option = click.option(
    "--improve",
    multiple=True,
    type=click.Choice(IMPROVEMENTS),
    help="Lose less by the quantizers that are placed; may be given several times, see the documentation.",
)
_DATA_OPTIONS = (
    click.option(
        "--data",
        metavar="SOURCE",
        help="Samples to verify and to measure with: images, arrays, JSON lines, a folder, module:function, or"
        " synthetic: made of the model.",
    ),
    click.option("--samples", type=click.IntRange(1), help="How many of the samples are used.  [default: all]"),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of the samples."),
    click.option(
        "--preprocessing",
        type=click.Path(path_type=Path),
        help="How images become inputs: TOML, or a JSON file of timm or transformers.  [default: the model's own]",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="Folder with tokenizer.json, for texts.  [default: the model's own]",
    ),
)
_RANGE_OPTIONS = (
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="max",
        show_default=True,
        help="How the range of an activation is found on the samples.",
    ),
    click.option(
        "--percentile",
        type=click.FloatRange(0, 100, min_open=True),
        default=PERCENTILE,
        show_default=True,
        help="Of --method percentile, in %.",
    ),
)
scales_option = click.option(
    "--scales", type=click.Path(path_type=Path), help="Ranges that gpusq calibrate has measured before."
)


def student_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say about a checkpoint what it does not say itself."""
    for option in reversed(
        [
            click.option(
                "--model",
                metavar="SPEC",
                help="Architecture of a state dict: timm:NAME, torchvision:NAME, hf:DIR or package.module:factory.",
            ),
            click.option(
                "--input",
                "inputs",
                multiple=True,
                metavar="NAME=1x3x224x224[:TYPE]",
                help="An input of the model, where that cannot be found out.",
            ),
            click.option(
                "--dynamic",
                multiple=True,
                metavar="NAME:AXIS",
                help="An axis that may vary; NAME may be '*'. All others are fixed.",
            ),
            click.option("--trust-code", is_flag=True, help="Run the code that the checkpoint brings along."),
            *_SCALE_OPTIONS,
        ]
    ):
        command = option(command)
    return command


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which samples are used, and how they become inputs."""
    for option in reversed(_DATA_OPTIONS):
        command = option(command)
    return command


def range_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how ranges are found on the samples."""
    for option in reversed(_RANGE_OPTIONS):
        command = option(command)
    return command


def scale_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide about scales what a checkpoint leaves open."""
    for option in reversed(_SCALE_OPTIONS):
        command = option(command)
    return command


def _load_options(
    model: str | None = None,
    inputs: tuple[str, ...] = (),
    dynamic: tuple[str, ...] = (),
    trust_code: bool = False,
    drop_dynamic: bool = False,
    bits: int | None = None,
) -> Any:
    from exporters.checkpoint import LoadOptions
    from exporters.signature import parse_input

    return LoadOptions(model, tuple(map(parse_input, inputs)), dynamic, trust_code, drop_dynamic, bits)


def _sample_source(
    data: str | None, count: int | None, seed: int, preprocessing: Path | None, tokenizer: Path | None
) -> Any:
    from calibration.samples import SampleSource

    given = {"--samples": count, "--preprocessing": preprocessing, "--tokenizer": tokenizer}
    if data is None:
        for option, value in given.items():
            if value is not None:
                raise click.UsageError(f"{option} says something about samples: give them with --data.")
        return None
    return SampleSource(data, count, seed, preprocessing, tokenizer)


def _method(name: str, percentile: float) -> Any:
    from calibration.methods import Method

    return Method(name, percentile)  # type: ignore[arg-type]  # click.Choice has checked it


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@student_options
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--opset", type=click.IntRange(18, 23), default=23, show_default=True, help="Opset of the graph.")
@json_option
def export(
    checkpoint: Path,
    model: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    trust_code: bool,
    drop_dynamic: bool,
    bits: int | None,
    out: Path,
    opset: int,
    as_json: bool,
) -> None:
    """Export CHECKPOINT, a file or a folder of any kind, as one clean ONNX file with its trained scales."""
    from deploy.export import export as run

    options = _load_options(model, inputs, dynamic, trust_code, drop_dynamic, bits)
    done = run(checkpoint, out, options, opset=opset, progress=_progress())
    _print(done.model_dump_json(indent=2, by_alias=True), lambda: click.echo(done.to_text()), as_json)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@student_options
@click.option("--profile", "profiles", multiple=True, required=True, help="Device profile; may be given several times.")
@out_option
@click.option(
    "--precision",
    type=click.Choice(_PRECISIONS),
    default="auto",
    show_default=True,
    help="auto keeps what was trained; int8 also quantizes what was not; the others drop the trained quantization.",
)
@placement_option
@data_options
@range_options
@scales_option
@repair_option
@io_option
@improve_option
@click.option("--baseline", type=click.Path(path_type=Path), help="Dense checkpoint to measure against, in FP32.")
@json_option
def convert(
    checkpoint: Path,
    model: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    trust_code: bool,
    drop_dynamic: bool,
    bits: int | None,
    profiles: tuple[str, ...],
    out: Path,
    precision: str,
    placement: str | None,
    data: str | None,
    samples: int | None,
    seed: int,
    preprocessing: Path | None,
    tokenizer: Path | None,
    method: str,
    percentile: float,
    scales: Path | None,
    repair_sparsity: bool,
    io_types: str,
    improve: tuple[str, ...],
    baseline: Path | None,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT into one verified bundle for each profile."""
    from deploy.conversion import convert as run

    done = run(
        checkpoint,
        profiles=profiles,
        out=out,
        options=_load_options(model, inputs, dynamic, trust_code, drop_dynamic, bits),
        precision=precision,  # type: ignore[arg-type]  # click.Choice has checked it
        placement=placement,  # type: ignore[arg-type]
        data=_sample_source(data, samples, seed, preprocessing, tokenizer),
        method=_method(method, percentile),
        scales=scales,
        repair_sparsity=repair_sparsity,
        io_types=io_types,  # type: ignore[arg-type]
        improve=improve,  # type: ignore[arg-type]
        baseline=baseline,
        progress=_progress(),
    )
    _report(done, as_json)


@main.command()
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@student_options
@click.option("--profile", required=True, help="Device profile that the graph is made for.")
@click.option("--precision", type=click.Choice(_PRECISIONS), default="auto", show_default=True, help="As of convert.")
@placement_option
@data_options
@range_options
@scales_option
@repair_option
@io_option
@improve_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@json_option
def surgery(
    model_path: Path,
    model: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    trust_code: bool,
    drop_dynamic: bool,
    bits: int | None,
    profile: str,
    precision: str,
    placement: str | None,
    data: str | None,
    samples: int | None,
    seed: int,
    preprocessing: Path | None,
    tokenizer: Path | None,
    method: str,
    percentile: float,
    scales: Path | None,
    repair_sparsity: bool,
    io_types: str,
    improve: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Write the graph of MODEL, an ONNX file or a checkpoint, that the device's compiler fuses best.

    Trained scales stay; every change is told, and what was left alone, with the reason.
    """
    from deploy.surgery import operate

    done = operate(
        model_path,
        out,
        profile=profile,
        options=_load_options(model, inputs, dynamic, trust_code, drop_dynamic, bits),
        precision=precision,  # type: ignore[arg-type]  # click.Choice has checked it
        placement=placement,  # type: ignore[arg-type]
        data=_sample_source(data, samples, seed, preprocessing, tokenizer),
        method=_method(method, percentile),
        scales=scales,
        repair_sparsity=repair_sparsity,
        io_types=io_types,  # type: ignore[arg-type]
        improve=improve,  # type: ignore[arg-type]
        progress=_progress(),
    )
    _print(done.model_dump_json(indent=2, by_alias=True), lambda: click.echo(done.to_text()), as_json)


@main.command()
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@student_options
@click.option("--profile", default="a100", show_default=True, help="The device whose graph is measured.")
@click.option(
    "--placement",
    type=click.Choice([placement for placement in PLACEMENTS if measures(placement)]),
    default="w8a8-linear",
    show_default=True,
    help="What is to be quantized.",
)
@data_options
@range_options
@click.option("--against", metavar="SOURCE", help="Other samples, to compare the ranges with.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file of the scales, in JSON.")
@json_option
def calibrate(
    model_path: Path,
    model: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    trust_code: bool,
    drop_dynamic: bool,
    bits: int | None,
    profile: str,
    placement: str,
    data: str | None,
    samples: int | None,
    seed: int,
    preprocessing: Path | None,
    tokenizer: Path | None,
    method: str,
    percentile: float,
    against: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure scales for what has none in MODEL, an ONNX file or a checkpoint, into a file that --scales takes.

    Trained scales stay. A run that was interrupted goes on where it ended.
    """
    from deploy.calibrate import calibrate as run

    if data is None:
        raise click.UsageError("Missing option '--data': the samples to measure on.")
    done = run(
        model_path,
        out,
        _sample_source(data, samples, seed, preprocessing, tokenizer),
        profile=profile,
        placement=placement,  # type: ignore[arg-type]  # click.Choice has checked it
        method=_method(method, percentile),
        options=_load_options(model, inputs, dynamic, trust_code, drop_dynamic, bits),
        against=None if against is None else _sample_source(against, samples, seed, preprocessing, tokenizer),
        progress=_progress(),
    )
    _print(done.model_dump_json(indent=2, by_alias=True), lambda: click.echo(done.to_text()), as_json)


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder for the bundles."
)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Convert the shipped 2:4 INT8 vision transformer for a100, agx-orin and cpu, and show what was found."""
    from deploy.demo import demo as run

    done = run(out, _progress())
    _report(done, as_json)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def build(bundle: Path, as_json: bool) -> None:
    """Build TensorRT's engine for BUNDLE on the device that it is made for."""
    from deploy.finish import finish

    manifest = finish(bundle, _progress())
    _print(manifest.to_json(), lambda: click.echo(f"{bundle}: {manifest.engines[-1].file}"), as_json)


@main.command()
@click.argument("name", required=False)
@click.option("--power-mode", help="Show NAME as it is in this power mode.")
@click.option("--detect", is_flag=True, help="Print the name of this host's own profile, and to stderr why.")
@json_option
def profiles(name: str | None, power_mode: str | None, detect: bool, as_json: bool) -> None:
    """List the device profiles, or show the one called NAME, which may be the path of your own."""
    if detect:
        _detect(name, as_json)
        return
    if power_mode and not name:
        raise click.UsageError("--power-mode needs the name of a profile")
    from deploy.show_profiles import list_text, one_text, show_profiles
    from profiles.device import list_devices, load_device

    devices = [load_device(name)] if name else list_devices()
    shown = show_profiles(device.at(power_mode) if power_mode else device for device in devices)
    width = shutil.get_terminal_size().columns
    _print(
        shown.to_json(),
        lambda: click.echo(one_text(shown.profiles[0], width) if name else list_text(shown, width)),
        as_json,
    )


def _detect(name: str | None, as_json: bool) -> None:
    if name:
        raise click.UsageError("--detect takes no name")
    from deploy.detect import detect

    found = detect()
    if not as_json:
        click.echo(found.why, err=True)
    _print(found.to_json(), lambda: click.echo(found.profile), as_json)


@main.command()
@click.option("--quiet", is_flag=True, help="Print nothing; exit 0 if this host can convert, else 1.")
@json_option
def doctor(quiet: bool, as_json: bool) -> None:
    """Say what this host has, what it can do with that, and what to install for the rest."""
    from deploy.doctor import diagnose

    found = diagnose()
    if not quiet:
        _print(found.to_json(), lambda: click.echo(found.to_text()), as_json)
    if quiet and not found.can_convert:
        sys.exit(1)


@main.command()
@click.argument("path", metavar="MODEL|BUNDLE|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--profile", help="Judge the sparsity by this profile's kernels; a bundle names its own.")
@scale_options
@json_option
def inspect(path: Path, profile: str | None, drop_dynamic: bool, bits: int | None, as_json: bool) -> None:
    """Show the sparsity and the Q/DQ of each linear layer in a model or a bundle, or what a checkpoint holds."""
    from deploy.inspect import inspect as run

    found = run(path, profile, _load_options(drop_dynamic=drop_dynamic, bits=bits))
    _print(found.to_json(), lambda: click.echo(found.to_text()), as_json)


@main.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path(path_type=Path))
@click.option("--profile", help="The device to compile MODEL for; a bundle names its own.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=8x3x224x224",
    help="The usual shape of an input, where it varies in more than the batch; the bytes moved are those of it.",
)
@json_option
def plan(path: Path, profile: str | None, inputs: tuple[str, ...], as_json: bool) -> None:
    """Show the kernels that the device's compiler makes of MODEL, or has made of BUNDLE.

    MODEL is compiled with TensorRT-RTX; no GPU is needed.
    """
    from deploy.show_plan import show_plan
    from exporters.signature import parse_input

    found = show_plan(path, profile, tuple(map(parse_input, inputs)))
    _print(found.to_json(), lambda: click.echo(found.to_text()), as_json)


@main.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", multiple=True, required=True, help="Device profile; may be given several times.")
@click.option("--batch", "batches", default="1,8,32", show_default=True, metavar="1,8,32", help="Batch sizes.")
@click.option("--baseline", type=click.Path(path_type=Path), help="ONNX file or bundle to compare with, as it is.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="Type a float32 MODEL on the way.")
@click.option("--power-mode", help="Of a Jetson, such as 30W.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=8x128", help="The shape of an input, as of plan.")
@json_option
def predict(
    path: Path,
    profiles: tuple[str, ...],
    batches: str,
    baseline: Path | None,
    precision: str | None,
    power_mode: str | None,
    inputs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict the latency of MODEL, an ONNX file, or of BUNDLE on devices that need not be here."""
    from deploy.predict import predict as run
    from exporters.signature import parse_input

    found = run(
        path,
        profiles,
        batches=_batches(batches),
        baseline=baseline,
        precision=precision,  # type: ignore[arg-type]  # click.Choice has checked it
        power_mode=power_mode,
        inputs=tuple(map(parse_input, inputs)),
    )
    _print(found.to_json(), lambda: click.echo(found.to_text()), as_json)


def _batches(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.UsageError(f"--batch {text}: give sizes, such as 1,8,32.")
    return tuple(map(int, parts))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--profile", required=True, help="The device whose parser and compiler must take MODEL.")
@click.option(
    "--sarif", type=click.Path(path_type=Path), help="Write the findings to this file as well, in SARIF 2.1.0."
)
@json_option
def lint(model: Path, profile: str, sarif: Path | None, as_json: bool) -> None:
    """Check MODEL, an ONNX file, against the hard rules of the device's compiler; exit with 3 if one is broken."""
    from deploy.lint import lint as run

    found = run(model, profile)
    if sarif is not None:
        from deploy.environment import versions
        from deploy.sarif import to_sarif

        sarif.write_text(to_sarif(found, model, versions().get("gpusq", "unknown")), encoding="utf-8")
    _print(found.to_json(), lambda: click.echo(found.to_text()), as_json)
    if found.errors:
        sys.exit(3)


def _progress() -> Progress:
    from deploy.progress import Progress, TerminalProgress

    return TerminalProgress() if sys.stderr.isatty() else Progress()


def _print(as_text: str, say: Callable[[], None], as_json: bool) -> None:
    if as_json:
        click.echo(as_text.rstrip())
    else:
        say()


def _report(done: Any, as_json: bool) -> None:
    """Print a conversion, and leave with 3 if it came out less than was asked for."""
    _print(done.model_dump_json(indent=2, by_alias=True), lambda: _say_bundles(done), as_json)
    if any(bundle.manifest.gates_missed for bundle in done.bundles):
        sys.exit(3)


def _say_bundles(done: Any) -> None:
    from deploy.report.verdicts import cards

    for bundle in done.bundles:
        click.echo(f"{bundle.path}")
        for card in cards(bundle.manifest):
            click.echo(f"  {card.title}: {card.headline} ({card.origin})")
        for sentence in bundle.manifest.gates_missed:
            click.echo(f"  Gate missed: {sentence}")
        click.echo(f"  report: {bundle.path / 'report.html'}")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that half-made files are removed."""
    sys.exit(128 + number)
