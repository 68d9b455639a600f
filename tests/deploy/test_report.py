"""The report, rendered from manifests like those of real bundles and opened in a real browser."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deploy.manifest import (
    BlockAttention,
    Engine,
    FileEntry,
    Float16Check,
    Interval,
    Kernel,
    Layer,
    Manifest,
    Measurement,
    Missing,
    Plan,
    Prediction,
    Sizes,
    Source,
    Timing,
    Verification,
)
from deploy.report import formats, report
from deploy.report.page import vega_script
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.sparsity import Sparsity
from profiles.device import load_device
from profiles.errors import GpusqError

CHROMIUM = shutil.which("chromium", path="/usr/bin") or shutil.which("chromium")
HOSTILE = "blocks.0.</script><b>|`hostile`"
DIGEST = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
WIDTH = 192

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


def linear(module: str, k: int, n: int, *, sparse: bool = True, eligible: bool = True, reason: str = "") -> Layer:
    pattern = Sparsity(
        pattern="2:4" if sparse else "dense",
        axis=1,
        zeros=0.5 if sparse else 0.0003,
        broken_groups=0 if sparse else k * n // 4,
        eligible=sparse and eligible,
        reason=reason,
    )
    return Layer(
        module=module,
        k=k,
        n=n,
        weight_type="int8" if sparse else "float16",
        activation_type="int8" if sparse else "float16",
        input_scale=0.02341 if sparse else None,
        weight_scale_min=0.000912 if sparse else None,
        weight_scale_max=0.00413 if sparse else None,
        sparsity=pattern,
    )


def vit_layers(*, eligible: bool, reason: str, extra: tuple[Layer, ...] = ()) -> tuple[Layer, ...]:
    shapes = {
        "attn.qkv": (WIDTH, 3 * WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (WIDTH, 4 * WIDTH),
        "mlp.fc2": (4 * WIDTH, WIDTH),
    }
    blocks = [
        linear(f"blocks.{block}.{name}", k, n, eligible=eligible, reason=reason)
        for block in range(4)
        for name, (k, n) in shapes.items()
    ]
    embed = linear("patch_embed.proj", 64, WIDTH, eligible=eligible, reason=reason)
    head = linear("head", WIDTH, 10, sparse=False, reason="not pruned: the head stays dense")
    return (embed, *blocks, head, *extra)


def vit_plan() -> Plan:
    kernels = [kernel("__myl_PadReshQuan", "pointwise", ("Half",), "patch_embed"), gemm("patch_embed.proj")]
    for block in (f"blocks.{number}" for number in range(4)):
        kernels += [
            kernel("__myl_MeanSubMulQuan", "pointwise", ("Half",), f"{block}.norm1"),
            gemm(f"{block}.attn.qkv"),
            kernel("__myl_MoveReshQuan", "pointwise", ("Int8",), f"{block}.attn"),
            kernel("__mha_v2_int8_s16_d64", "attention", ("Int8", "Int8", "Int8"), f"{block}.attn"),
            kernel("sm80_fused_add", "fused-gemm", ("Int8", "Int8", "Half"), f"{block}.attn.proj", block),
            kernel("__myl_MeanSubMulQuan", "pointwise", ("Half", "Float"), f"{block}.norm2"),
            kernel("sm80_fused_gelu", "fused-gemm", ("Int8", "Int8", "Float"), f"{block}.mlp.fc1", f"{block}.mlp.act"),
            kernel("__myl_Quan", "pointwise", ("Half",), f"{block}.mlp.act"),
            kernel("sm80_fused_add", "fused-gemm", ("Int8", "Int8", "Half"), f"{block}.mlp.fc2", block),
        ]
    kernels += [kernel("__myl_MeanMove", "pointwise", ("Half",), "norm"), kernel("Reformat", "pointwise", ())]
    kernels += [kernel("sm80_xmma_gemm_f16f16", "gemm", ("Half", "Half"), "head")]
    return Plan(
        source="TensorRT-RTX 1.7.1.116, ahead of time",
        target="SM80",
        kernels=tuple(kernels),
        gemms_by_type={"Int8": 17, "Half": 1},
        linear_gemms=18,
        linear_gemms_int8=17,
        attentions=tuple(BlockAttention(module=f"blocks.{number}.attn", fused=True) for number in range(4)),
        kernels_per_block={f"blocks.{number}": 9 for number in range(4)},
        weights_bytes=1_894_400,
        scratch_bytes=786_432,
    )


def kernel(name: str, kind: str, types: tuple[str, ...], *modules: str) -> Kernel:
    return Kernel(name=f"{name}_0x1f3a", kind=kind, types=types, modules=modules)


def gemm(module: str) -> Kernel:
    return kernel("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x64", "gemm", ("Int8", "Int8", "Float"), module)


def fields(**changes: Any) -> dict[str, Any]:
    source = Source(
        file="fashion_vit_w8a8_24.pt",
        sha256=DIGEST,
        model="students.fashion_vit.model:fashion_vit",
        parameters=1_815_562,
        card={"epochs": 30, "top1": 0.912, "sparsity": "2:4 magnitude, then QAT with distillation"},
    )
    return {
        "gpusq": "0.1.0",
        "created": "2026-11-24T04:22:44+00:00",
        "profile": "a100-sxm-80gb",
        "device": "NVIDIA A100 SXM 80 GB",
        "device_profile": load_device("a100"),
        "gates_missed": (),
        "student": source,
        "baseline": None,
        "precision_asked": "w8a8-linear",
        "precision": "w8a8-linear",
        "float_type": "float16",
        "opset": 20,
        "host": {"system": "Linux 6.1, x86_64", "cpu": "2 cores", "gpu": "none"},
        "versions": {"onnx": "1.23.2", "onnxruntime": "1.32.0", "tensorrt_rtx": "1.7.1.116"},
        "layers": vit_layers(eligible=True, reason="its GEMM must have an INT8 output"),
        "sizes": SIZES,
        "passes": PASSES,
        "engines": (),
        "missing": (),
        "plan": None,
        "verified": None,
        "measured": None,
        "files": {"model.onnx": FileEntry(sha256=DIGEST, bytes=1_987_654)},
        **changes,
    }


SIZES = Sizes(
    pruned_fp32=7_127_040,
    pruned_compressed=1_113_600,
    pruned_ratio=6.4,
    scales=31_556,
    total_fp32=7_262_248,
    total_compressed=1_276_080,
    total_ratio=5.69,
)
PASSES = (
    Outcome(name="fold_constants", changed=12, left_alone=()),
    Outcome(
        name="move_q_across_transpose",
        changed=4,
        left_alone=(LeftAlone(where="blocks.0.attn", why="the scale is per channel on the moved axis"),),
    ),
    Outcome(name="annotate_sparsity", changed=17, left_alone=(LeftAlone(where="head", why="dense"),)),
)
VERIFIED = Verification(
    samples="Fashion-MNIST, test",
    samples_sha256=DIGEST,
    count=1000,
    labelled=True,
    runtime="onnxruntime 1.32.0, CPUExecutionProvider",
    student_top1=0.912,
    onnx_top1=0.912,
    agreement=1.0,
    max_abs_difference=0.00231,
    drop=Interval(value=0.0, low=-0.002, high=0.002),
    float16=Float16Check(count=64, finite=True, agreement=1.0, max_abs_difference=0.031),
)


def gpu_manifest(*extra: Layer) -> Manifest:
    return Manifest(
        **fields(
            layers=vit_layers(eligible=True, reason="its GEMM must have an INT8 output", extra=extra),
            plan=vit_plan(),
            verified=VERIFIED,
            engines=(
                Engine(
                    file="engine.sm80.rtx",
                    runtime="tensorrt-rtx",
                    runtime_version="1.7.1.116",
                    target="SM80",
                    nearest=False,
                    note="compiled ahead of time, without a GPU",
                ),
            ),
            missing=(
                Missing(
                    what="the TensorRT 10.16 engine",
                    why="TensorRT compiles on the device itself, and this host has no GPU.",
                    how="docker run --gpus all -v $PWD/dist:/dist gpusq:cuda gpusq build /dist/a100-sxm-80gb",
                ),
                Missing(
                    what="latency",
                    why="No A100 on this host.",
                    how="gpusq bench dist/a100-sxm-80gb --baseline dist/fp16",
                ),
            ),
            predicted=(
                Prediction(what="GEMM time, dense INT8", value=0.0412, unit="ms", how="roofline of the profile"),
                Prediction(what="GEMM time, sparse INT8", value=0.0307, unit="ms", how="roofline of the profile"),
            ),
        )
    )


def cpu_manifest(**changes: Any) -> Manifest:
    measured = Measurement(
        device="AMD EPYC 7B13, 2 cores",
        runtime="onnxruntime 1.32.0",
        threads=2,
        batch=1,
        pairs=300,
        student=timing("fashion_vit_w8a8_24", "w8a8-linear", 1.59, 2.08),
        baseline=timing("fashion_vit_dense", "float32", 2.09, 2.58),
        speedup=Interval(value=1.32, low=1.28, high=1.36),
        verdict="faster",
        raw="latency.csv",
    ).model_copy(update=changes)
    dense = "the CPU has no sparse kernels"
    return Manifest(
        **fields(
            profile="cpu",
            device="the CPU of this host",
            float_type="float32",
            baseline=Source(file="fashion_vit_dense.pt", sha256=DIGEST, model="fashion_vit", parameters=1, card={}),
            layers=vit_layers(eligible=False, reason=dense),
            verified=VERIFIED.model_copy(update={"onnx_top1": 0.91, "agreement": 0.9996}),
            engines=(
                Engine(
                    file="model.onnx",
                    runtime="onnxruntime",
                    runtime_version="1.32.0",
                    target="x86_64",
                    nearest=False,
                    note="",
                ),
            ),
            measured=measured,
        )
    )


def timing(name: str, precision: str, p50: float, p99: float) -> Timing:
    return Timing(name=name, precision=precision, p50_ms=around(p50), p99_ms=around(p99))


def around(value: float) -> Interval:
    return Interval(value=value, low=value * 0.98, high=value * 1.03)


def minimal_manifest() -> Manifest:
    empty = Sizes(
        pruned_fp32=0,
        pruned_compressed=0,
        pruned_ratio=1,
        scales=0,
        total_fp32=0,
        total_compressed=0,
        total_ratio=1,
    )
    return Manifest(**fields(layers=(), sizes=empty, passes=(), host={}, versions={}, files={}))


def hostile_manifest() -> Manifest:
    manifest = gpu_manifest(linear(HOSTILE, 64, 64))
    plan = vit_plan()
    kernels = (*plan.kernels, kernel(HOSTILE, "gemm", ("Int8", "Int8"), HOSTILE))
    return manifest.model_copy(update={"plan": plan.model_copy(update={"kernels": kernels})})


def write_samples(bundle: Path, pairs: int = 300) -> None:
    chance = random.Random(7)
    lines = ["pair,model,latency_ms"]
    for pair in range(pairs):
        for model, centre in (("student", 1.5), ("baseline", 2.0)):
            lines.append(f"{pair},{model},{centre + chance.expovariate(8):.4f}")
    lines.append(f"{pairs},student,19.5")
    (bundle / "latency.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def render(manifest: Manifest, bundle: Path) -> tuple[str, str]:
    if manifest.measured:
        write_samples(bundle)
    report(manifest, bundle)
    return tuple((bundle / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))  # type: ignore[return-value]


def without_vega(page: str) -> str:
    assert vega_script() in page
    return page.replace(vega_script(), "")


def visible(page: str) -> str:
    """Return the page's text, white space collapsed."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", without_vega(page), flags=re.DOTALL)
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
    assert len(page.encode("utf-8")) <= 2_000_000
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".csv") == ["report.html", "report.md"]
    own = without_vega(page)
    assert not re.search(r"https?://|@import|url\(", own)
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", own)
    assert all(reference.startswith(("#", "data:,")) for reference in references)


def test_policy_allows_its_own_scripts_and_nothing_else(tmp_path: Path) -> None:
    page, _ = render(gpu_manifest(), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy.group(1)).split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"('sha256-[\w+/=]+' ?){2}", rules["script-src"])
    assert "unsafe" not in html.unescape(policy.group(1))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page, text = render(hostile_manifest(), tmp_path)
    assert "</script><b>" not in page
    assert "<b>|" not in page
    assert html.unescape(HOSTILE) in visible(page)
    specs = plot_specs(page)
    assert specs["plan"]["data"]["values"][-1]["modules"] == HOSTILE
    assert "`blocks.0.</script><b>\\|'hostile'`" in text


def plot_specs(page: str) -> dict[str, Any]:
    data = re.search(r'<script type="application/json" id="plots">(.*?)</script>', page, flags=re.DOTALL)
    assert data is not None
    specs: dict[str, Any] = json.loads(data.group(1))
    return specs


def test_a_long_block_takes_rows_that_stay_together(tmp_path: Path) -> None:
    kernels = [kernel("MatMul", "gemm", ("Float",), f"blocks.{number % 2}.mlp") for number in range(60)]
    plan = vit_plan().model_copy(update={"kernels": tuple(kernels)})
    page, _ = render(gpu_manifest().model_copy(update={"plan": plan}), tmp_path)
    rows = plot_specs(page)["plan"]["encoding"]["y"]["scale"]["domain"]
    assert rows == ["blocks.0", "blocks.0 · 2", "blocks.1", "blocks.1 · 2"]


def test_headings_descend_one_level_at_a_time(tmp_path: Path) -> None:
    page, _ = render(gpu_manifest(), tmp_path)
    levels = [int(level) for level in re.findall(r"<h([1-6])", without_vega(page))]
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
    elements.feed(without_vega(page))
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
    assert plot_specs(page) == {}


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


def test_no_baseline_is_no_verdict(tmp_path: Path) -> None:
    page, _ = render(cpu_manifest(verdict="no baseline", speedup=None, baseline=None), tmp_path)
    assert "nothing is said about being faster or slower" in visible(page)
    assert {step["model"] for step in plot_specs(page)["latency"]["layer"][0]["data"]["values"]} == {"student"}


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


@dataclass(frozen=True)
class Seen:
    """What the browser found in a page."""

    inner_width: int
    scroll_width: int
    marks: dict[str, int]
    requests: list[str]
    problems: list[str]
    console: list[str]


# The report runs unchanged, under its own policy, in a frame of the width asked for; the page around it looks inside.
PROBE = """<!DOCTYPE html><meta charset="utf-8">
<style>body { margin: 0 } iframe { border: 0; width: %(width)dpx; height: 900px }</style>
<link rel="icon" href="data:,"><iframe id="frame"></iframe><pre id="seen"></pre><script>
const problems = [];
const frame = document.getElementById("frame");
frame.addEventListener("load", () => {
  const inside = frame.contentWindow, page = frame.contentDocument;
  const look = () => {
    const plots = [...page.querySelectorAll(".plot")];
    const marks = Object.fromEntries(plots.map((plot) => [plot.id, plot.querySelectorAll(
      "svg .mark-rect path, svg .mark-line path, svg .mark-symbol path").length]));
    document.getElementById("seen").textContent = JSON.stringify({
      inner_width: inside.innerWidth, scroll_width: page.documentElement.scrollWidth, marks,
      requests: inside.performance.getEntriesByType("resource").map((entry) => entry.name), problems });
  };
  inside.addEventListener("error", (event) => problems.push(String(event.message)));
  inside.addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
  page.addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
  setTimeout(look, 3000);
});
frame.srcdoc = %(page)s;
</script>"""


def look_at(page: str, width: int, folder: Path) -> Seen:
    probe = folder / "probe.html"
    probe.write_text(PROBE % {"width": width, "page": json.dumps(page).replace("<", "\\u003c")}, encoding="utf-8")
    dom, log = browse(probe, folder)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found is not None, log
    return Seen(**json.loads(html.unescape(found.group(1))), console=console(log))


def browse(file: Path, folder: Path) -> tuple[str, str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--no-first-run",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--v=0", "--window-size=1400,1000", "--virtual-time-budget=10000"]
    command += ["--dump-dom", file.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.TimeoutExpired:  # headless Chromium now and then never starts; a page that hangs does so again
        shutil.rmtree(folder / "profile", ignore_errors=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("make", [gpu_manifest, cpu_manifest, minimal_manifest, hostile_manifest])
def test_a_browser_draws_it_without_complaint(make: Callable[[], Manifest], width: int, tmp_path: Path) -> None:
    page, _ = render(make(), tmp_path)
    seen = look_at(page, width, tmp_path)
    assert seen.inner_width == width
    assert seen.scroll_width <= width
    assert set(seen.marks) == {f"plot-{name}" for name in plot_specs(page)}
    assert all(number >= 2 for number in seen.marks.values())
    assert (seen.requests, seen.problems, seen.console) == ([], [], [])


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("profile", ["a100", "cpu"])
def test_a_browser_draws_the_demonstration_without_complaint(
    bundles: dict[str, Path], profile: str, width: int, tmp_path: Path
) -> None:
    page = (bundles[profile] / "report.html").read_text(encoding="utf-8")
    seen = look_at(page, width, tmp_path)
    assert seen.scroll_width <= width
    assert all(number >= 2 for number in seen.marks.values())
    assert seen.marks
    assert (seen.requests, seen.problems, seen.console) == ([], [], [])


@needs_chromium
def test_the_file_itself_opens_without_complaint(tmp_path: Path) -> None:
    render(cpu_manifest(), tmp_path)
    dom, log = browse(tmp_path / "report.html", tmp_path)
    assert console(log) == []
    assert len(re.findall(r'<svg [^>]*class="marks"', dom)) == 2


@needs_chromium
def test_the_browser_tests_would_notice(tmp_path: Path) -> None:
    page, _ = render(minimal_manifest(), tmp_path)
    bad = page.replace("<main", '<img alt="" src="https://example.invalid/x.png"><canvas width="1500"></canvas><main')
    seen = look_at(bad, 400, tmp_path)
    assert seen.scroll_width > 400
    assert any("Content Security Policy" in line for line in seen.console)
