"""dequantize_int4: every backend and layout gives the reference's bits."""

import pytest
import torch

import llmkern
from llmkern._backends import compiled_module
from llmkern.formats.int4_cpu import to_cpu_layout
from llmkern.ops import dequantize_int4
from llmkern.reference.w4a16_gemm import dequantize_int4 as reference
from llmkern.testing import random_int4_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# id: N, K, group_size, symmetric
CASES = {
    "one_group": (64, 128, 128, True),
    "n_odd": (77, 128, 64, True),
    "n_below_a_block": (3, 64, 32, False),
    "g32_asym": (130, 96, 32, False),
    "group_not_a_power_of_two": (65, 320, 160, False),
    "group_of_all_columns": (9, 512, 512, True),
}
BACKENDS = [f"cpu-{isa}" for isa in compiled_module("_cpu")[0].isas()] + ["reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, _, isa = request.param.partition("-")
    cpu = compiled_module("_cpu")[0]
    before = cpu.isa()
    cpu.set_isa(isa or before)
    with llmkern.use_backend(name):
        yield name
    cpu.set_isa(before)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference_in_both_layouts(backend, case, dtype):
    N, K, group_size, symmetric = case
    for scale_dtype in (F32, BF16, F16):
        weight = random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        spec = reference(*weight, group_size, dtype)
        assert torch.equal(dequantize_int4(*weight, group_size=group_size, dtype=dtype), spec)
        packed = to_cpu_layout(*weight, group_size)
        out = dequantize_int4(*packed, group_size=group_size, dtype=dtype, layout="cpu")
        assert torch.equal(out, spec)


def test_dtype_defaults_to_that_of_the_scales():
    weight = random_int4_weight(8, 32, 32, scale_dtype=BF16)
    assert dequantize_int4(*weight, group_size=32).dtype == BF16


@pytest.mark.parametrize("layout", ["canonical", "cpu"])
def test_opcheck(layout):
    weight = random_int4_weight(70, 64, 32, symmetric=False)
    if layout == "cpu":
        weight = to_cpu_layout(*weight, 32)
    op = torch.ops.llmkern.dequantize_int4.default
    torch.library.opcheck(op, (*weight, 32, layout, BF16))


def test_compiles_without_a_graph_break():
    weight = random_int4_weight(8, 64, 64)
    compiled = torch.compile(
        lambda q, s: dequantize_int4(q, s, group_size=64) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*weight[:2]), 2 * dequantize_int4(*weight, group_size=64))


def test_bad_dtype_is_refused():
    with pytest.raises(
        ValueError, match=r"dequantize_int4: dtype: got torch.int8, expected float32"
    ):
        dequantize_int4(*random_int4_weight(8, 64, 64), group_size=64, dtype=torch.int8)
