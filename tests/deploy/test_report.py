"""The report, rendered from manifests like those of real bundles."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.manifest import Float16Check, Interval, Manifest
from deploy.report import formats, report
from profiles.errors import GpusqError
from tests.deploy.report_manifests import (
    HOSTILE,
    VERIFIED,
    around,
    cpu_manifest,
    gpu_manifest,
    hostile_manifest,
    kernel,
    minimal_manifest,
    vit_plan,
    write_samples,
)


def render(manifest: Manifest, bundle: Path) -> tuple[str, str]:
    if manifest.measured:
        write_samples(bundle)
    report(manifest, bundle)
    return tuple((bundle / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))  # type: ignore[return-value]


def visible(page: str) -> str:
    """Return the page's text, white space collapsed."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


MANIFESTS = pytest.mark.parametrize("make", [gpu_manifest, cpu_manifest, minimal_manifest])


@MANIFESTS
def test_names_every_module_in_both_reports(make: Callable[[], Manifest], tmp_path: Path) -> None:
    manifest = make()
    page, text = render(manifest, tmp_path)
    for layer in manifest.layers:
        assert f"<code>{layer.module}</code>" in page
        assert f"| `{layer.module}` " in text


@MANIFESTS
def test_is_one_small_file_that_refers_to_no_other(make: Callable[[], Manifest], tmp_path: Path) -> None:
    page, _ = render(make(), tmp_path)
    assert len(page.encode("utf-8")) <= 400_000
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".csv") == ["report.html", "report.md"]
    own = page
    assert not re.search(r"https?://|@import|url\(", own)
    references = re.findall(r"""(?<![\w-])(?:src|href)\s*=\s*["']?([^"'\s>]*)""", own)
    assert all(reference.startswith(("#", "data:,")) for reference in references)


def test_policy_allows_its_own_scripts_and_nothing_else(tmp_path: Path) -> None:
    page, _ = render(gpu_manifest(), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy.group(1)).split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["script-src"])
    assert "unsafe" not in html.unescape(policy.group(1))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page, text = render(hostile_manifest(), tmp_path)
    assert "</script><b>" not in page
    assert "<b>|" not in page
    assert html.unescape(HOSTILE) in visible(page)
    assert "`blocks.0.</script><b>\\|'hostile'`" in text


def drawings(page: str) -> list[str]:
    """The ids of the figures that hold a drawing."""
    return re.findall(r'<figure id="([^"]*)"', page)


def test_a_long_block_takes_rows_that_stay_together(tmp_path: Path) -> None:
    kernels = [kernel("MatMul", "gemm", ("Float",), f"blocks.{number % 2}.mlp") for number in range(60)]
    plan = vit_plan().model_copy(update={"kernels": tuple(kernels)})
    page, _ = render(gpu_manifest().model_copy(update={"plan": plan}), tmp_path)
    rows = re.findall(r">(blocks[^<]*)</text>", page)
    assert rows == ["blocks.0", "blocks.0 · 2", "blocks.1", "blocks.1 · 2"]


def test_headings_descend_one_level_at_a_time(tmp_path: Path) -> None:
    page, _ = render(gpu_manifest(), tmp_path)
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


class _Elements(HTMLParser):
    """Counts elements, and collects ids and the targets of links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.targets += [(values["href"] or "")[1:]] if tag == "a" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@MANIFESTS
def test_elements_are_closed_and_links_lead_somewhere(make: Callable[[], Manifest], tmp_path: Path) -> None:
    page, _ = render(make(), tmp_path)
    elements = _Elements()
    elements.feed(page)
    assert elements.open == []
    assert len(elements.ids) == len(set(elements.ids))
    assert set(elements.targets) <= set(elements.ids)


def test_says_what_is_absent(tmp_path: Path) -> None:
    page, text = render(minimal_manifest(), tmp_path)
    for words in (
        "Not verified here",
        "Not measured",
        "Nothing was predicted",
        "No engine: not built here",
        "nothing was compiled here",
        "Nothing is listed as missing",
        "No pass ran over the graph",
    ):
        assert words in visible(page)
        assert words in text
    assert drawings(page) == []


def test_a_gpu_bundle_without_a_measurement_claims_no_speed(tmp_path: Path) -> None:
    page, text = render(gpu_manifest(), tmp_path)
    for words in (visible(page), text):
        assert "faster" not in words
        assert "Accuracy kept" in words
        assert "17 of 18 linears INT8" in words
        assert "compiled for SM80; not timed" in words
        assert "decided by TensorRT on the device" in words
        assert "missing: the TensorRT 10.16 engine" in words
        assert "Predicted, not measured" in words
        assert "20 bit, or 5 bit per weight. Against FP32: 32 / 5 = 6.40×" in words.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("verdict", "value", "words"),
    [
        ("faster", 1.32, "Faster: 1.32× [1.29, 1.36]"),
        ("slower", 0.87, "Slower: 0.870× [0.853, 0.896]"),
        ("inconclusive", 1.01, "Inconclusive: 1.01× [0.990, 1.04]"),
    ],
)
def test_every_verdict_has_the_same_place(verdict: str, value: float, words: str, tmp_path: Path) -> None:
    page, text = render(cpu_manifest(verdict=verdict, speedup=around(value)), tmp_path)
    headline = re.search(r'class="headline">[^/]*</span> (\w+: [^<]*)</p>', page)
    assert headline is not None
    assert headline.group(1).replace("\u00a0", " ") == words
    assert words in text.replace("\\", "")
    assert "measured on AMD EPYC 7B13" in visible(page)


def test_a_run_that_is_not_used_says_why(tmp_path: Path) -> None:
    reason = "other processes used 36 % of the cores"
    manifest = cpu_manifest(verdict="inconclusive", speedup=around(1.5), broken=(reason,))
    page, text = render(manifest, tmp_path)
    for words in (visible(page), text):
        assert f"The run is not used, since {reason}." in words
        assert f"not used: {reason}" in words
    assert "neither faster nor slower" not in visible(page)


def test_no_baseline_is_no_verdict(tmp_path: Path) -> None:
    page, _ = render(cpu_manifest(verdict="no baseline", speedup=None, baseline=None), tmp_path)
    assert "nothing is said about being faster or slower" in visible(page)
    assert "baseline p50" not in page


@pytest.mark.parametrize(
    ("drop", "agreement", "words"),
    [
        (Interval(value=0.001, low=-0.002, high=0.003), 0.997, "Accuracy kept"),
        (Interval(value=0.02, low=0.01, high=0.03), 0.97, "2.0 points lower"),
        (Interval(value=0.3, low=-0.1, high=0.4), 0.6, "Undecided: up to 40.0 points lower"),
        (Interval(value=0.0, low=0.0, high=0.0), 0.2, "Undecided"),
    ],
    ids=["within half a point", "surely lower", "too few samples", "as right, but other answers"],
)
def test_accuracy_is_called_kept_only_where_the_interval_says_so(
    drop: Interval, agreement: float, words: str, tmp_path: Path
) -> None:
    verified = VERIFIED.model_copy(update={"drop": drop, "agreement": agreement})
    page, _ = render(gpu_manifest().model_copy(update={"verified": verified}), tmp_path)
    assert words in visible(page)
    assert ("Accuracy kept" in page) == (words == "Accuracy kept")


def test_an_overflow_in_float16_is_said_first(tmp_path: Path) -> None:
    check = Float16Check(count=64, finite=False, agreement=0.1, max_abs_difference=None)
    verified = VERIFIED.model_copy(update={"float16": check})
    page, text = render(gpu_manifest().model_copy(update={"verified": verified}), tmp_path)
    assert "Overflows in float16" in visible(page)
    assert "an operator overflows" in text


def test_gates_that_were_missed_have_a_section_of_their_own(tmp_path: Path) -> None:
    manifest = gpu_manifest().model_copy(update={"gates_missed": ("the attention of blocks.3.attn is not fused",)})
    for words in render(manifest, tmp_path):
        assert "Less than was asked for" in words
        assert "the attention of blocks.3.attn is not fused" in words


def test_what_tensorrt_chose_takes_the_place_of_what_is_open(tmp_path: Path) -> None:
    manifest = gpu_manifest()
    engine = manifest.engines[0].model_copy(update={"built_on": "an A100", "sparse_eligible": 17, "sparse_chosen": 4})
    page, _ = render(manifest.model_copy(update={"engines": (engine,)}), tmp_path)
    assert "chosen by TensorRT: 4" in visible(page)
    assert "decided by TensorRT on the device" not in visible(page)


def test_an_engine_for_a_relative_says_so(tmp_path: Path) -> None:
    manifest = gpu_manifest()
    relative = manifest.engines[0].model_copy(update={"target": "SM86", "nearest": True})
    plan = vit_plan().model_copy(update={"target": "SM86"})
    page, text = render(manifest.model_copy(update={"engines": (relative,), "plan": plan}), tmp_path)
    for words in (visible(page), text):
        assert "tensorrt-rtx 1.7.1.116 for SM86, a relative of the device: compiled, not timed" in words
        assert "compiled for SM86, a relative of the device; not timed" in words
        assert "Compiled for SM86, a relative of the device, read back from" in words


def test_slow_samples_that_are_not_drawn_are_counted(tmp_path: Path) -> None:
    page, _ = render(cpu_manifest(), tmp_path)
    assert re.search(r"Not drawn: \d+ of the samples, slower than", visible(page))


def test_markdown_tables_are_aligned(tmp_path: Path) -> None:
    _, text = render(gpu_manifest(), tmp_path)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 8
    assert all(len({len(line) for line in table.splitlines()}) == 1 for table in tables)
    assert not re.search(r"(?<!\\)<\w", re.sub(r"`[^`]*`", "", text))
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (None, "no such file"),
        ("pair,model\n", "the header is not pair,model,latency_ms"),
        ("pair,model,latency_ms\n0,student,fast\n", "line 2 is not a sample: 0,student,fast"),
        ("pair,model,latency_ms\n0,teacher,1.0\n", "line 2 is not a sample"),
        ("pair,model,latency_ms\n0,student,nan\n", "line 2 is not a sample"),
        ("pair,model,latency_ms\n0,baseline,1.0\n", "no sample of the student"),
    ],
)
def test_damaged_samples_are_an_error_that_names_the_line(csv: str | None, message: str, tmp_path: Path) -> None:
    if csv is not None:
        (tmp_path / "latency.csv").write_text(csv, encoding="utf-8")
    with pytest.raises(GpusqError, match=re.escape(message)):
        report(cpu_manifest(), tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.percent(0.912), "91.2 %"),
        (formats.percent(1.0), "100.0 %"),
        (formats.percent(0.99996), "> 99.9 %"),
        (formats.percent(0.0), "0.0 %"),
        (formats.percent(0.0001), "< 0.1 %"),
        (formats.milliseconds(3.2), "3.20 ms"),
        (formats.milliseconds(0.04123), "0.0412 ms"),
        (formats.milliseconds(1234.5), "1,234 ms"),
        (formats.size(999), "999 B"),
        (formats.size(1234), "1.23 kB"),
        (formats.size(999_999), "1.00 MB"),
        (formats.size(12_345_678), "12.3 MB"),
        (formats.times(6.4), "6.40×"),
    ],
)
def test_formats_figures(text: str, expected: str) -> None:
    assert text == expected
