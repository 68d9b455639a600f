"""Write a report: of a bundle, an ONNX file or a history, or of two of them beside each other.

BUNDLE         its manifest, with timings, predictions and claims     → BUNDLE/report.html, BUNDLE/report.md
MODEL.onnx     what the graph says, and the same                      → report.html, report.md
gpusq.db       the newest runs, and all before them                   → report.html, report.md
two of them    the comparison of `gpusq compare`, and what explains it → report.html, report.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from deploy import sbom
from deploy.bundle import staged_copy
from deploy.claims import JudgedClaims
from deploy.claims import claims as judge_claims
from deploy.compare import compare_subjects
from deploy.comparison.metrics import Gate
from deploy.comparison.subject import read_subject
from deploy.comparison.timings import find_timings
from deploy.environment import versions
from deploy.finish import check_files, write_manifest
from deploy.manifest import MODEL_FILE, SIGNATURE_NAME, Manifest, is_bundle, read_manifest
from deploy.predict import BATCHES, predict
from deploy.prediction import Predicted
from deploy.report import HTML_NAME, MARKDOWN_NAME, read_bundle_samples, write
from deploy.report.bundle_page import Beside, bundle_page
from deploy.report.comparison_page import comparison_page
from deploy.report.document import Document
from deploy.report.history_page import history_page
from deploy.report.model_page import model_page
from deploy.report.timings import read_timings
from deploy.timing.history import DEFAULT
from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1


@dataclass(frozen=True)
class ReportSpec:
    """What a report looks at.

    Attributes:
        history: the results of bench; None for gpusq.db in the working folder, if there is one.
        profile: the device that an ONNX file is compiled and predicted for; a bundle knows its own.
        predict: whether latencies are predicted.
        batches: the batch sizes that they are predicted for.
        baseline: what a prediction is compared with, an ONNX file or a bundle.
        claims: a file of claims, or the name of a shipped one.
    """

    history: Path | None = None
    profile: str | None = None
    predict: bool = True
    batches: tuple[int, ...] = BATCHES
    baseline: Path | None = None
    claims: str | None = None


class Written(Record):
    """A report that was written."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    page: Path
    markdown: Path
    verdicts: tuple[str, ...] = Field(description="A line for each verdict, gate and claim, with its origin.")

    def to_text(self) -> str:
        """The verdicts, and where the rest is."""
        return "\n".join([*self.verdicts, f"report: {self.page}", f"        {self.markdown}"])


def write_report(given: Sequence[str], out: Path | None = None, spec: ReportSpec | None = None) -> Written:
    """Write the report of a bundle, an ONNX file or a history, or of two beside each other, the baseline first.

    Args:
        given: one or two paths; of two, one may be `gpusq.db:NAME`.
        out: the page; the Markdown stands beside it. None for the bundle itself, or report.html in the working folder.
        spec: what is looked at.

    Raises:
        GpusqError: there is no such thing, it cannot be read, or a signed bundle would be changed.
    """
    spec = spec or ReportSpec()
    if spec.history is not None and not spec.history.is_file():
        raise GpusqError(f"no history in {spec.history}", hint="`gpusq bench MODEL` writes one")
    if len(given) == 1 and out is None and is_bundle(Path(given[0])):
        return _refresh(Path(given[0]), spec)
    document = _comparison(given[0], given[1], spec) if len(given) > 1 else _single(given[0], spec)
    return _write(document, out or Path(HTML_NAME))


def _refresh(bundle: Path, spec: ReportSpec) -> Written:
    """Write the report into the bundle, and its hashes into the manifest."""
    if (bundle / SIGNATURE_NAME).exists():
        raise GpusqError(
            f"{bundle} is signed, and a report in it is a change", hint=f"gpusq report {bundle} -o {HTML_NAME}"
        )
    manifest = read_manifest(bundle)
    document = _of_bundle(bundle, manifest, spec)
    with staged_copy(bundle) as copy:
        check_files(copy, manifest)
        write(document, copy / HTML_NAME, copy / MARKDOWN_NAME)
        write_manifest(manifest, copy, parts_list=(copy / sbom.FILE_NAME).is_file())
    return _written(document, bundle / HTML_NAME, bundle / MARKDOWN_NAME)


def _write(document: Document, page: Path) -> Written:
    text = page.with_suffix(".md")
    write(document, page, text)
    return _written(document, page, text)


def _written(document: Document, page: Path, text: Path) -> Written:
    return Written(page=page, markdown=text, verdicts=tuple(_verdicts(document)))


def _verdicts(document: Document) -> Iterator[str]:
    for card in document.cards:
        yield f"{card.title}: {card.headline} ({card.origin})"
    for line in document.lines:
        yield f"{line.what}: {line.verdict} ({line.origin}){''.join(f'; {detail}' for detail in line.details)}"


def _single(given: str, spec: ReportSpec) -> Document:
    path = Path(given)
    if is_bundle(path):
        return _of_bundle(path, read_manifest(path), spec)
    if path.suffix == ".db":
        found = read_timings(path)
        if isinstance(found, str):
            raise GpusqError(found, hint="`gpusq bench MODEL` adds runs")
        judged = None if spec.claims is None else judge_claims(spec.claims, [given])
        return history_page(path.name, found, Beside(timings=found, claims=judged), _gpusq())
    subject = read_subject(given, spec.profile)
    device = None if spec.profile is None else load_device(spec.profile)
    beside = _beside(given, subject.models, path, device, spec)
    return model_page(subject, beside, _gpusq())


def _of_bundle(bundle: Path, manifest: Manifest, spec: ReportSpec) -> Document:
    _check_profile(bundle, manifest, spec)
    models = [entry.sha256 for entry in manifest.files.values()]
    names = (manifest.student.model, str(bundle))
    beside = _beside(str(bundle), models, bundle, manifest.device_profile, spec, names)
    own = {name: entry for name, entry in manifest.files.items() if name not in (HTML_NAME, MARKDOWN_NAME)}
    return bundle_page(manifest.model_copy(update={"files": own}), read_bundle_samples(manifest, bundle), beside)


def _check_profile(bundle: Path, manifest: Manifest, spec: ReportSpec) -> None:
    if spec.profile is not None and load_device(spec.profile).name != manifest.device_profile.name:
        raise GpusqError(
            f"{bundle} was made for {manifest.device_profile.name}, not for {spec.profile}",
            hint=f"gpusq report {bundle / MODEL_FILE} --profile {spec.profile}",
        )


def _beside(
    given: str, models: Sequence[str], path: Path, device: Device | None, spec: ReportSpec, names: tuple[str, ...] = ()
) -> Beside:
    timings = read_timings(spec.history or DEFAULT, models, [given])
    return Beside(
        timings=timings,
        predicted=_predicted(path, device, spec),
        claims=_claims(given, spec),
        models=(*names, given, *models),
    )


def _predicted(path: Path, device: Device | None, spec: ReportSpec, baseline: Path | None = None) -> Predicted | str:
    """What is predicted, or why nothing is: a report is written either way."""
    if not spec.predict:
        return "it was not asked for"
    if device is None:
        return "no device was named; --profile names one"
    try:
        return predict(path, [device], batches=spec.batches, baseline=baseline or spec.baseline)
    except GpusqError as error:
        return error.message


def _claims(given: str, spec: ReportSpec) -> JudgedClaims | None:
    if spec.claims is None:
        return None
    history = spec.history or DEFAULT
    return judge_claims(spec.claims, [given, *([str(history)] if history.is_file() else [])])


def _comparison(baseline: str, candidate: str, spec: ReportSpec) -> Document:
    before, after = (read_subject(each, spec.profile) for each in (baseline, candidate))
    timings = find_timings(before, after, spec.history or DEFAULT, Gate().last)
    found = compare_subjects(before, after, Gate(), timings)
    predicted: Predicted | str = "one of them is no model"
    if all(_is_model(each) for each in (baseline, candidate)):
        predicted = _predicted(Path(candidate), _device(candidate, spec), spec, Path(baseline))
    return comparison_page(found, (before, after), timings, predicted, _gpusq())


def _is_model(given: str) -> bool:
    return is_bundle(Path(given)) or Path(given).suffix == ".onnx"


def _device(given: str, spec: ReportSpec) -> Device | None:
    if is_bundle(Path(given)):
        return read_manifest(Path(given)).device_profile
    return None if spec.profile is None else load_device(spec.profile)


def _gpusq() -> str:
    return versions().get("gpusq", "unknown")
