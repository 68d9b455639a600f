"""Options of a builder, which `gpusq build` and `gpusq convert` share."""

from __future__ import annotations

from typing import Any

import click

from deploy.commands.gathered import gathered

_LEVELS = 5


def _build_options(
    shapes: tuple[str, ...],
    dense: bool,
    optimization_level: int | None,
    workspace_mib: int | None,
    tiling: str | None,
    dla: int | None,
    gpu_fallback: bool,
    hardware_compatibility: str,
    version_compatible: bool,
    weight_streaming: bool,
    refit: bool,
) -> Any:
    from deploy.build_options import BuildOptions, parse_shapes

    return BuildOptions(
        tuple(map(parse_shapes, shapes)),
        not dense,
        optimization_level,
        workspace_mib,
        tiling,  # type: ignore[arg-type]  # click.Choice has checked it
        dla,
        gpu_fallback,
        hardware_compatibility,  # type: ignore[arg-type]
        version_compatible,
        weight_streaming,
        refit,
    )


def _required(require: tuple[str, ...]) -> Any:
    from deploy.requirements import parse_requirement

    return tuple(map(parse_requirement, require))


#: What is asked of TensorRT's builder, as `build`.
build_options = gathered(
    "build",
    _build_options,
    click.option(
        "--shapes",
        multiple=True,
        metavar="NAME:MIN:OPT:MAX",
        help="Smallest, usual and largest shape of an input, such as x:1x3x224x224:8x3x224x224:32x3x224x224, or one"
        " shape for all three. An input that is named again begins the next optimization profile."
        "  [default: one profile, batches of 1, 8 and 32]",
    ),
    click.option("--dense", is_flag=True, help="Take no sparse kernels, also for weights that are 2:4."),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, _LEVELS),
        help="How long the builder searches for faster kernels.  [default: TensorRT's own, 3]",
    ),
    click.option("--workspace-mib", type=click.IntRange(1), help="Most memory for a kernel's intermediate results."),
    click.option(
        "--tiling",
        type=click.Choice(["none", "fast", "moderate", "full"]),
        help="How hard the builder tries to keep neighbouring layers in the L2 cache; TensorRT 10.8 and later.",
    ),
    click.option("--dla", type=click.IntRange(0), metavar="CORE", help="Run on this core of the DLA; for CNNs."),
    click.option(
        "--gpu-fallback", is_flag=True, help="With --dla: what it cannot run may run on the GPU; each is told."
    ),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere+", "same-compute-capability"]),
        default="none",
        show_default=True,
        help="Other GPUs that must run the engine; costs speed.",
    ),
    click.option("--version-compatible", is_flag=True, help="Later versions of TensorRT must run the engine."),
    click.option("--weight-streaming", is_flag=True, help="Weights may stay in the host's memory."),
    click.option("--refit", is_flag=True, help="The engine's weights can be replaced."),
)

#: What the result must come to, as `required`.
require_option = gathered(
    "required",
    _required,
    click.option(
        "--require",
        multiple=True,
        metavar="GATE",
        help="int8-gemms=100%, fused-attention, sparse>=N or all-tactics; exit with 3 where it is missed."
        "  [default: INT8 layers are INT8, attentions fused]",
    ),
)
