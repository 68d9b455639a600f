"""`gpusq bench` and `gpusq history`: time models, and list what was timed."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import progress, tell

_EXISTING = click.Path(path_type=Path, exists=True)
db_option = click.option("--db", type=PATH, default=Path("gpusq.db"), show_default=True, help="The history of results.")


@click.command()
@click.argument("models", metavar="BUNDLE|MODEL...", nargs=-1, required=True, type=_EXISTING)
@click.option("--baseline", type=_EXISTING, help="Bundle or model that each is compared with.")
@click.option("--batch", default="1", show_default=True, metavar="1,8,32", help="Batch sizes.")
@click.option(
    "--streams", type=click.IntRange(1, 256), default=1, show_default=True, help="Threads that call back to back."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    help="For the pairs of a batch.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for another bench on this device.")
@click.option("--layers", is_flag=True, help="Time each kernel too, with the modules that it computes.")
@db_option
@json_option
def bench(
    models: tuple[Path, ...],
    baseline: Path | None,
    batch: str,
    streams: int,
    seconds: float,
    wait: bool,
    layers: bool,
    db: Path,
    as_json: bool,
) -> None:
    """Time bundles or ONNX models on this host beside a baseline, and keep every sample in the history."""
    from deploy.bench_models import BenchSpec, bench_models, parse_batches
    from deploy.timing.interleave import Budget

    found = bench_models(
        models,
        baseline,
        BenchSpec(batches=parse_batches(batch), streams=streams, budget=Budget(seconds), wait=wait, layers=layers),
        history=db,
        progress=progress(),
        say=lambda text: click.echo(text, err=True),
    )
    tell(found, as_json, found.to_text)


@click.command()
@click.argument("model", required=False)
@click.option("--last", type=click.IntRange(1), help="Only so many of the newest results.")
@click.option("--plot", type=PATH, help="Write the latencies over time to this SVG file.")
@click.option("--samples", type=PATH, help="Write every sample to this CSV or .parquet file.")
@db_option
@json_option
def history(
    model: str | None, last: int | None, plot: Path | None, samples: Path | None, db: Path, as_json: bool
) -> None:
    """List what bench has measured, or only the results of MODEL, a name or a SHA-256."""
    from deploy.show_history import show_history, write_plot, write_samples

    found = show_history(db, model, last)
    if plot is not None:
        write_plot(found, plot)
    if samples is not None:
        write_samples(found, db, samples)
    tell(found, as_json, found.to_text)
