"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from calibration.method_names import METHODS, PERCENTILE
from deploy.commands.gathered import Command, gathered
from deploy.commands.printing import progress
from exporters.improvement import IMPROVEMENTS
from exporters.placement import PLACEMENTS

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")
PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

_DROP_DYNAMIC = click.option(
    "--drop-dynamic",
    is_flag=True,
    help="Leave activations float whose scales their library computes at run time; the weights stay quantized.",
)
_BITS = click.option(
    "--bits",
    type=click.IntRange(1, 8),
    help="Bits of the quantized weights, where the checkpoint does not say.  [default: 8]",
)


def _scale_options(drop_dynamic: bool, bits: int | None) -> Any:
    return _load_options(None, (), (), False, drop_dynamic, bits)


def _load_options(
    model: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    trust_code: bool,
    drop_dynamic: bool,
    bits: int | None,
) -> Any:
    from exporters.checkpoint import LoadOptions
    from exporters.signature import parse_input

    return LoadOptions(model, tuple(map(parse_input, inputs)), dynamic, trust_code, drop_dynamic, bits)


#: What a checkpoint leaves open about its scales, as `options`.
scale_options = gathered("options", _scale_options, _DROP_DYNAMIC, _BITS)

#: What a checkpoint does not say about itself, as `options`.
student_options = gathered(
    "options",
    _load_options,
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
    _DROP_DYNAMIC,
    _BITS,
)


def _sample_source(
    data: str | None, samples: int | None, seed: int, preprocessing: Path | None, tokenizer: Path | None
) -> Any:
    from calibration.samples import SampleSource

    given = {"--samples": samples, "--preprocessing": preprocessing, "--tokenizer": tokenizer}
    if data is None:
        for option, value in given.items():
            if value is not None:
                raise click.UsageError(f"{option} says something about samples: give them with --data.")
        return None
    return SampleSource(data, samples, seed, preprocessing, tokenizer)


#: Which samples are used and how they become inputs, as `data`; None where none are given.
data_options = gathered(
    "data",
    _sample_source,
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
        type=PATH,
        help="How images become inputs: TOML, or a JSON file of timm or transformers.  [default: the model's own]",
    ),
    click.option("--tokenizer", type=PATH, help="Folder with tokenizer.json, for texts.  [default: the model's own]"),
)


def _method(method: str | None, percentile: float) -> Any:
    from calibration.methods import Method

    return None if method is None else Method(method, percentile)  # type: ignore[arg-type]  # click.Choice checked it


_METHOD = click.option(
    "--method",
    type=click.Choice(METHODS),
    help="How the range of an activation is found on the samples.  [default: least-loss where INT8 holds it, else max]",
)
_MEASURED_METHOD = click.option(
    "--method",
    type=click.Choice(METHODS),
    default="max",
    show_default=True,
    help="How the range of an activation is found on the samples.",
)
_PERCENTILE = click.option(
    "--percentile",
    type=click.FloatRange(0, 100, min_open=True),
    default=PERCENTILE,
    show_default=True,
    help="Of --method percentile, in %.",
)

#: How ranges are found on the samples, as `method`.
range_options = gathered("method", _method, _MEASURED_METHOD, _PERCENTILE)


def _graph_choices(
    placement: str | None,
    method: str | None,
    percentile: float,
    scales: Path | None,
    repair_sparsity: bool,
    share_concat_scales: bool,
    io_types: str,
    improve: tuple[str, ...],
    target_drop: float | None,
    for_batch: int | None,
) -> dict[str, Any]:
    if for_batch is not None and placement != "best":
        raise click.UsageError("--for-batch says what --placement best chooses for: give them together.")
    return {
        "placement": placement,
        "for_batch": for_batch or 1,
        "method": _method(method, percentile),
        "scales": scales,
        "repair_sparsity": repair_sparsity,
        "share_concat_scales": share_concat_scales,
        "io_types": io_types,
        "improve": improve,
        "target_drop": target_drop,
    }


#: What is asked of the graph, as `graph`: keyword arguments that convert and surgery share.
graph_options = gathered(
    "graph",
    _graph_choices,
    click.option(
        "--placement",
        type=click.Choice((*PLACEMENTS, "best")),
        help="Quantizers for what has none, best being what is predicted fastest; see the documentation.",
    ),
    _METHOD,
    _PERCENTILE,
    click.option("--scales", type=PATH, help="Ranges that gpusq calibrate has measured before."),
    click.option(
        "--repair-sparsity", is_flag=True, help="Prune layers that are 2:4 but for a few groups; the error is reported."
    ),
    click.option(
        "--share-concat-scales",
        is_flag=True,
        help="Give the inputs of a concatenation the largest of their scales; each change is reported.",
    ),
    click.option(
        "--io-types",
        type=click.Choice(["keep", "graph"]),
        default="keep",
        show_default=True,
        help="Inputs and outputs stay float32, or get the type of the graph, without casts.",
    ),
    click.option(
        "--improve",
        multiple=True,
        type=click.Choice(IMPROVEMENTS),
        help="Lose less by the quantizers that are placed; may be given several times, see the documentation.",
    ),
    click.option(
        "--target-drop",
        type=click.FloatRange(0, 100),
        metavar="POINTS",
        help="Leave the layers float that cost more accuracy than this on the samples; see the documentation.",
    ),
    click.option(
        "--for-batch",
        type=click.IntRange(1),
        metavar="N",
        help="Batch that --placement best is chosen for.  [default: 1]",
    ),
)


def _cache(cache: Path | None, no_cache: bool) -> Any:
    from deploy.cache import Cache, cache_root

    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache contradict each other.")
    return Cache(None if no_cache else cache_root(cache), progress())


#: Where finished stages are kept, as `cache`.
cache_options = gathered(
    "cache",
    _cache,
    click.option(
        "--cache",
        type=PATH,
        help="Folder that keeps finished stages.  [default: $GPUSQ_CACHE, or gpusq's in the user's cache folder]",
    ),
    click.option("--no-cache", is_flag=True, help="Make everything anew, and keep nothing for another time."),
)
explain_option = click.option(
    "--explain", is_flag=True, help="Say of each stage whether the cache had it, and if not, why not."
)


def _batches(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text}: give sizes, such as 1,8,32.")
    return tuple(map(int, parts))


def batches_option(told: str) -> Callable[[Command], Command]:
    """`--batch`, the batch sizes that something is predicted for; `told` is its help."""
    sizes = "1,8,32"
    return click.option(
        "--batch", "batches", default=sizes, show_default=True, metavar=sizes, callback=_batches, help=told
    )
