from __future__ import annotations

from pathlib import Path

import pytest

from deploy.job import Job
from deploy.manifest import BlockAttention, CompiledLayer, Engine, Plan
from deploy.progress import Progress
from deploy.requirements import Requirement, default_requirements, missed, parse_requirement
from exporters.checkpoint import LoadOptions
from exporters.placement import Placement
from profiles.errors import GpusqError

INT8 = CompiledLayer(module="fc1", asked=("int8", "int8"), compiled=("Int8", "Int8"), kernel="k1")
HALF = CompiledLayer(module="fc2", asked=("int8", "int8"), compiled=("Half", "Int8"), kernel="k2")
LEFT = CompiledLayer(module="conv", asked=("int8", "int8"), compiled=("Half", "Half"), kernel="k4", judged=False)
LOST = CompiledLayer(module="fc3", asked=("int8", "int8"), compiled=(), kernel="")
FLOAT = CompiledLayer(module="patch", asked=("float16", "float16"), compiled=("Half", "Half"), kernel="k3")
FUSED = BlockAttention(module="blocks.0.attn", fused=True)
APART = BlockAttention(module="blocks.1.attn", fused=False)


def plan(*layers: CompiledLayer, attentions: tuple[BlockAttention, ...] = (), target: str = "SM80") -> Plan:
    return Plan(
        source="a compiler",
        target=target,
        kernels=(),
        gemms_by_type={},
        linear_gemms=0,
        linear_gemms_int8=0,
        attentions=attentions,
        kernels_per_block={},
        layers=layers,
    )


def tensorrt(chosen: int | None, skipped: int = 0) -> Engine:
    return Engine(
        file="engine.tensorrt",
        runtime="tensorrt",
        runtime_version="10.3.0",
        target="SM87",
        nearest=False,
        note="",
        sparse_eligible=12,
        sparse_chosen=chosen,
        tactics_skipped=skipped,
    )


def sentences(text: str, found: Plan | None, *engines: Engine) -> list[str]:
    return [each.sentence for each in missed([parse_requirement(text)], found, engines)]


@pytest.mark.parametrize(
    "text", ["int8-gemms=100%", "int8-gemms=99.5%", "fused-attention=90%", "sparse>=40", "all-tactics"]
)
def test_what_is_written_is_read(text: str) -> None:
    assert str(parse_requirement(text)) == text


def test_left_out_numbers_are_all_or_one() -> None:
    assert parse_requirement("fused-attention") == Requirement("fused-attention", 1)
    assert parse_requirement("int8-gemms") == Requirement("int8-gemms", 1)
    assert parse_requirement("sparse") == Requirement("sparse", 1)


@pytest.mark.parametrize("text", ["", "int8", "int8-gemms=101%", "sparse=3", "sparse>=x", "fused-attention>=1"])
def test_anything_else_is_one_error(text: str) -> None:
    with pytest.raises(GpusqError, match="--require"):
        parse_requirement(text)


def test_layers_that_are_not_int8_are_told_with_the_reason() -> None:
    (found,) = missed([Requirement("int8-gemms", 1)], plan(INT8, HALF, LOST, FLOAT), ())
    assert found.sentence == "1 of 3 INT8 layers were compiled to INT8 GEMMs"
    assert [(row[0], row[2]) for row in found.rows] == [("fc2", "Half×Int8"), ("fc3", "–")]
    assert found.rows[0][3] == "the weight is INT8, the activation is not: its quantizer was not fused"
    assert found.rows[1][3] == "no kernel of the plan names it"


def test_what_the_compiler_is_no_judge_of_is_missed_only_where_the_user_requires_it() -> None:
    (default,) = default_requirements(plan(INT8, LEFT), (), float_type="float16", placement="as-trained")
    assert list(missed([default], plan(INT8, LEFT), ())) == []
    assert [each.sentence for each in missed([default], plan(INT8, HALF, LEFT), ())] == [
        "1 of 2 INT8 layers were compiled to INT8 GEMMs"
    ]
    assert default_requirements(plan(LEFT), (), float_type="float16", placement="as-trained") == []
    (found,) = missed([parse_requirement("int8-gemms")], plan(INT8, LEFT), ())
    assert found.sentence == "1 of 2 INT8 layers were compiled to INT8 GEMMs"
    assert [(row[0], row[3]) for row in found.rows] == [
        ("conv", "this compiler has no such kernel for the device; TensorRT on the device has")
    ]


def test_a_share_is_enough_where_a_share_is_required() -> None:
    assert sentences("int8-gemms=50%", plan(INT8, HALF)) == []
    assert sentences("int8-gemms=51%", plan(INT8, HALF)) == ["1 of 2 INT8 layers were compiled to INT8 GEMMs"]


def test_what_the_model_does_not_have_is_missed_where_it_was_required() -> None:
    assert sentences("int8-gemms", plan(FLOAT)) == ["int8-gemms=100%: no layer of the model is quantized to INT8"]
    assert sentences("fused-attention", plan(INT8)) == ["fused-attention=100%: no attention was found in the model"]


def test_attention_that_fell_apart_is_told_by_name() -> None:
    found = plan(attentions=(FUSED, APART))
    assert sentences("fused-attention", found) == ["the attention of blocks.1.attn is not fused"]
    assert sentences("fused-attention=50%", found) == []


def test_sparse_kernels_are_counted_in_tensorrts_engine_alone() -> None:
    assert sentences("sparse>=40", plan(INT8), tensorrt(40)) == []
    assert sentences("sparse>=41", plan(INT8), tensorrt(40)) == [
        "TensorRT chose sparse kernels for 40 layers, not for 41"
    ]
    assert "cannot be told: TensorRT built no engine here" in sentences("sparse", plan(INT8))[0]
    assert "cannot be told: the log of the build says nothing" in sentences("sparse", plan(INT8), tensorrt(None))[0]


def test_kernels_that_were_not_tried_are_missed_where_all_are_required() -> None:
    assert sentences("all-tactics", None, tensorrt(1)) == []
    assert sentences("all-tactics", None, tensorrt(1, skipped=3)) == [
        "3 kernels were not tried for want of memory: build on a quiet device"
    ]


@pytest.mark.parametrize("found", [None, plan(HALF, target="cpu")])
def test_without_a_compilers_plan_nothing_is_passed_that_was_required(found: Plan | None) -> None:
    assert "cannot be told" in sentences("int8-gemms", found)[0]


def test_defaults_follow_the_model_and_the_placement() -> None:
    def default(
        found: Plan | None, *engines: Engine, float_type: str = "float16", placement: str = "as-trained"
    ) -> str:
        return ", ".join(map(str, default_requirements(found, engines, float_type=float_type, placement=placement)))

    assert default(plan(FLOAT)) == ""
    assert default(plan(INT8, attentions=(FUSED,))) == "int8-gemms=100%, fused-attention=100%"
    assert default(plan(FLOAT, attentions=(FUSED,)), float_type="float32") == ""
    assert default(plan(INT8, target="cpu")) == ""
    assert default(plan(INT8), placement="sparse-int8") == "int8-gemms=100%"
    assert default(plan(INT8), tensorrt(0), placement="sparse-int8") == "int8-gemms=100%, sparse>=1"


@pytest.mark.parametrize(
    ("placement", "asked", "on_device"),
    [
        ("sparse-int8", (), ("sparse>=1",)),
        ("sparse-int8", ("sparse>=40",), ("sparse>=40",)),
        ("w8a8-linear", ("fused-attention=90%",), ("fused-attention=90%",)),
    ],
)
def test_a_conversion_says_what_the_engine_on_the_device_must_come_to(
    tmp_path: Path, placement: Placement, asked: tuple[str, ...], on_device: tuple[str, ...]
) -> None:
    job = Job(
        checkpoint=tmp_path,
        options=LoadOptions(),
        precision="auto",
        asked_placement=placement,
        data=None,
        baseline=None,
        out=tmp_path,
        progress=Progress(),
        required=tuple(map(parse_requirement, asked)),
    )
    assert job.required_on_device == on_device
