"""The CUDA and Triton backends on a CUDA device, against float64."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from llmkern import ops, use_backend
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat
from llmkern.nn import IntLinear, Lut4Linear
from llmkern.reference import hessian_update as hessian_spec
from llmkern.reference import w4a16_gemm as gemm_spec
from llmkern.testing import (
    CANONICAL_CASES,
    CUDA_LAYOUT_CASES,
    SPARSE24_CASES,
    CodeCase,
    Sparse24Case,
    assert_matches,
    random_int4_weight,
)

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def weight(N, K, group_size, device=DEVICE, **options):
    parts = random_int4_weight(N, K, group_size, **options)
    return tuple(None if t is None else t.to(device) for t in parts)


LARGE_CASES = {
    "large_m1_4096": CodeCase(1, 4096, 4096, 128, "symmetric", torch.bfloat16),
    "m1_n_odd": CodeCase(1, 257, 96, 32, "zeros"),
    "large_m33": CodeCase(33, 1024, 1024, 128),
    "large_m200_tails_everywhere": CodeCase(200, 333, 352, 32, "zeros", torch.bfloat16),
    "large_m1_4096_nf4": CodeCase(1, 4096, 4096, 64, "nf4"),
    "large_m32_row_books": CodeCase(32, 1024, 1024, 128, "row", None),
    "large_m200_group_books": CodeCase(200, 333, 352, 32, "group"),
}


@dtypes
@pytest.mark.parametrize(
    "case", (CANONICAL_CASES | LARGE_CASES).values(), ids=CANONICAL_CASES | LARGE_CASES
)
def test_products_over_the_canonical_layout(case, dtype, backend):
    weight = case.weight(DEVICE)
    x = torch.randn(case.M, case.K, device=DEVICE).to(dtype)
    bias = torch.randn(case.N, device=DEVICE).to(dtype)
    out = case.multiply(x, weight, bias)
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    case.check(out, x, weight, bias, slack=4)
    assert torch.equal(out, case.multiply(x, weight, bias)), "two runs differ"


HALVES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
TIERS = {
    "large_decode_4096": CodeCase(1, 4096, 4096, 128, "symmetric", torch.bfloat16),
    "large_decode_k_and_v": CodeCase(32, 1024, 4096, 128, "zeros", torch.float16),
    "large_decode_4096_nf4": CodeCase(16, 4096, 4096, 64, "nf4"),
    "large_tile_k_and_v": CodeCase(64, 1024, 4096, 128, "symmetric", torch.bfloat16),
    "large_wide": CodeCase(1000, 520, 4096, 64, "symmetric", torch.bfloat16),
    "large_wide_nf4": CodeCase(300, 4096, 4096, 64, "nf4"),
    "large_wide_row_books": CodeCase(129, 520, 1024, 128, "row", torch.bfloat16),
    "large_last_tile": CodeCase(1023, 256, 512, 128, "zeros", torch.bfloat16),
    "large_dense": CodeCase(1024, 520, 512, 128, "symmetric", torch.bfloat16),
    "large_dense_group_books": CodeCase(1024, 520, 512, 128, "group", torch.bfloat16),
}


@HALVES
@pytest.mark.parametrize(
    "case", (CUDA_LAYOUT_CASES | TIERS).values(), ids=CUDA_LAYOUT_CASES | TIERS
)
def test_products_over_the_cuda_layout(case, dtype):
    weight = case.weight(DEVICE)
    x = torch.randn(case.M, case.K, device=DEVICE).to(dtype)
    bias = torch.randn(case.N, device=DEVICE).to(dtype)
    with use_backend("cuda"):
        packed = case.pack(weight)
        out = case.multiply(x, packed, bias, "cuda")  # right behind the packer
        for _ in range(20):
            assert torch.equal(out, case.multiply(x, packed, bias, "cuda")), "two runs differ"
        w = case.dequantize(packed, dtype, "cuda")
    assert torch.equal(w, case.dense(weight, dtype))
    case.check(out, x, weight, bias, slack=4)


@pytest.mark.parametrize(
    "case", (CUDA_LAYOUT_CASES | TIERS).values(), ids=CUDA_LAYOUT_CASES | TIERS
)
def test_the_packers_make_the_same_bits_as_torch(case):
    weight = case.weight(DEVICE)
    with use_backend("cuda"):
        packed = case.pack(weight)
        back = case.unpack(packed)
    want = case.pack(weight, kernel=False)
    for ours, other in (*zip(packed, want, strict=True), *zip(back, weight, strict=True)):
        assert (ours is None) == (other is None)
        assert ours is None or (ours.dtype == other.dtype and torch.equal(ours, other))


@pytest.mark.parametrize("values", ["symmetric", "nf4", "row", "group"])
def test_linear_layers_run_packed_and_save_what_they_were_given(values):
    dense = torch.nn.Linear(512, 300, dtype=torch.bfloat16, device=DEVICE)
    if values == "symmetric":
        layer = IntLinear.from_linear(dense, 4, 128)
    elif values == "nf4":
        layer = Lut4Linear.from_linear(dense, "nf4", 64)
    else:
        _, codebook, scales = CodeCase(1, 300, 512, 64, values).weight(DEVICE)
        codes = torch.randint(0, 16, (300, 512), dtype=torch.uint8, device=DEVICE)
        layer = Lut4Linear.from_parts(codes, codebook, scales, group_size=64, dtype=torch.bfloat16)
    saved = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(5, 512, device=DEVICE).bfloat16()
    w, y = layer.dequantize(torch.float64), layer(x)
    assert "layout=cuda" in repr(layer)
    want = F.linear(x.double(), w, None if layer.bias is None else layer.bias.double())
    assert_matches(y, want, want.bfloat16(), slack=8)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, saved[name])


@pytest.mark.parametrize("values", ["symmetric", "nf4"])
def test_a_row_of_a_large_product_depends_on_no_other_of_its_tier(values):
    case = CodeCase(100, 4096, 4096, 128, values)
    x = torch.randn(100, 4096, device=DEVICE).bfloat16()
    with use_backend("cuda"):
        packed = case.pack(case.weight(DEVICE))
        whole = case.multiply(x[:32], packed, None, "cuda")
        for rows in (slice(0, 1), slice(3, 12), slice(7, 30)):
            assert torch.equal(case.multiply(x[rows], packed, None, "cuda"), whole[rows])
        tiles = case.multiply(x, packed, None, "cuda")
        assert torch.equal(case.multiply(x[50:90], packed, None, "cuda"), tiles[50:90])


@pytest.mark.parametrize("values", ["symmetric", "nf4"])
@pytest.mark.parametrize("M", [1, 32, 64, 200, 1024])
def test_cuda_graph_capture_of_every_tier(M, values):
    case = CodeCase(M, 1024, 4096, 128, values)
    x = torch.randn(M, 4096, device=DEVICE).bfloat16()

    def chain():  # the second product waits for the first
        y = case.multiply(x, packed, None, "cuda")
        return case.multiply(y.repeat(1, 4), packed, None, "cuda")

    with use_backend("cuda"):
        packed = case.pack(case.weight(DEVICE))
        chain()
        torch.cuda.synchronize(DEVICE)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, chain())


SPARSE24_TIERS = {
    "decode_4096": Sparse24Case(1, 4096, 4096),
    "tile": Sparse24Case(256, 520, 4096),
    "large": Sparse24Case(1000, 4096, 4096),
    "codes_decode_k_and_v": Sparse24Case(32, 1024, 4096, 128, False, torch.float16),
    "codes_tile": Sparse24Case(200, 520, 4096, 64, True, torch.bfloat16),
    "codes_large": Sparse24Case(1000, 4104, 1024, 128, False, torch.bfloat16),
}


@HALVES
@pytest.mark.parametrize(
    "case", (SPARSE24_CASES | SPARSE24_TIERS).values(), ids=SPARSE24_CASES | SPARSE24_TIERS
)
def test_sparse24_over_the_cuda_layout(case, dtype):
    parts = tuple(None if t is None else t.to(DEVICE) for t in case.weight(dtype))
    packed = case.pack(parts)
    x = torch.randn(case.M, case.K, device=DEVICE).to(dtype)
    bias = torch.randn(case.N, device=DEVICE).to(dtype)
    with use_backend("cuda"):
        out = case.multiply(x, packed, bias, "cuda")
        again = (case.multiply(x, packed, bias, "cuda") for _ in range(20))
        assert all(torch.equal(out, y) for y in again), "two runs differ"
    case.check(out, x, parts, bias)


@pytest.mark.parametrize("case", SPARSE24_TIERS.values(), ids=SPARSE24_TIERS)
def test_sparse24_in_triton(case):
    parts = tuple(None if t is None else t.to(DEVICE) for t in case.weight(torch.bfloat16))
    x = torch.randn(case.M, case.K, device=DEVICE).bfloat16()
    with use_backend("triton"):
        out = case.multiply(x, parts)
        assert torch.equal(out, case.multiply(x, parts)), "two runs differ"
    case.check(out, x, parts)


@pytest.mark.parametrize("group_size", [None, 128], ids=["values", "codes"])
@pytest.mark.parametrize("M", [1, 32, 200, 4096])
def test_cuda_graph_capture_of_every_sparse24_tier(M, group_size):
    case = Sparse24Case(M, 1024, 1024, group_size)
    parts = tuple(None if t is None else t.to(DEVICE) for t in case.weight(torch.bfloat16))
    packed = case.pack(parts)
    x = torch.randn(M, 1024, device=DEVICE).bfloat16()

    def chain():  # the second product waits for the first
        y = case.multiply(x, packed, None, "cuda")
        return case.multiply(y, packed, None, "cuda")

    with use_backend("cuda"):
        chain()
        torch.cuda.synchronize(DEVICE)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, chain())


def test_rows_of_x_lie_apart(backend):
    parts = weight(64, 96, 32)
    x = torch.randn(7, 101, device=DEVICE)[:, :96]
    out = ops.w4a16_gemm(x, *parts, group_size=32)
    assert torch.equal(out, ops.w4a16_gemm(x.contiguous(), *parts, group_size=32))


@dtypes
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
def test_dequantize_int4(symmetric, dtype, backend):
    parts = weight(333, 2080, 160, symmetric=symmetric, scale_dtype=torch.bfloat16)
    out = ops.dequantize_int4(*parts, group_size=160, dtype=dtype)
    assert torch.equal(out, gemm_spec.dequantize_int4(*parts, 160, dtype))


@dtypes
@pytest.mark.parametrize(("T", "K"), [(1, 40), (1000, 67), (700, 512)], ids=str)
def test_hessian_update(T, K, dtype, backend):
    x = (torch.randn(T, K, device=DEVICE) + 0.5).to(dtype)
    H = torch.randn(K, K, device=DEVICE)
    want, like, before = H.double(), H.clone(), H.clone()
    ops.hessian_update(H, x, 2 / T)
    hessian_spec.hessian_update(want, x, 2 / T)
    hessian_spec.hessian_update(like, x, 2 / T)
    assert_matches(H, want, like)
    assert torch.equal(H.triu(1), before.triu(1)), "the upper triangle was touched"


@dtypes
@pytest.mark.parametrize("E", [3, 48], ids=["small_tiles", "large_tiles"])
def test_hessian_update_of_experts(E, dtype, backend):
    x = torch.randn(E * 700, 264, device=DEVICE).to(dtype)
    offsets = torch.arange(E + 1, device=DEVICE) * 700 - torch.arange(E + 1, device=DEVICE) ** 2
    H = torch.zeros(E, 264, 264, device=DEVICE)
    ops.hessian_update(H, x, 1 / 700, offsets)
    want, like = H.double().zero_(), torch.zeros_like(H)
    hessian_spec.hessian_update(want, x, 1 / 700, offsets)
    hessian_spec.hessian_update(like, x, 1 / 700, offsets)
    assert_matches(H, want, like)
    again = torch.zeros_like(H)
    ops.hessian_update(again, x, 1 / 700, offsets)
    assert torch.equal(H, again), "two runs differ"


# format, options
OBS_CASES = {
    "dynamic": (QuantFormat(4, 64), {}),
    "dynamic_zeros_clip_search": (QuantFormat(3, 32, False), {"clip_search": True}),
    "static_act_order": (QuantFormat(4, 32, False), {"group_scales": "static", "act_order": True}),
    "per_channel": (QuantFormat(8, None, False), {}),
}


@pytest.mark.parametrize("case", OBS_CASES.values(), ids=OBS_CASES)
def test_obs_quantize(case, backend):
    fmt, options = case
    N, K = 200, 320
    w = torch.randn(N, K, device=DEVICE)
    x = torch.randn(700, K, device=DEVICE) @ (
        torch.eye(K, device=DEVICE) + 0.3 * torch.randn(K, K, device=DEVICE) / K**0.5
    )
    factor = ops.factorize_hessian(2 / 700 * x.t() @ x, act_order=bool(options.get("act_order")))
    options = {key: value for key, value in options.items() if key != "act_order"}
    result = ops.obs_quantize(w, factor, fmt, **options)
    with use_backend("reference"):
        want = ops.obs_quantize(w, factor, fmt, **options)
    # Sums in another order turn an occasional near tie, and then what follows in that row.
    assert (result.codes == want.codes).all(1).float().mean() > 0.9
    torch.testing.assert_close(result.loss.sum(), want.loss.sum(), rtol=1e-3, atol=0)
    zeros = 1 << (fmt.bits - 1) if result.zeros is None else result.zeros.float()[..., None]
    codes = result.codes.view(N, -1, fmt.groups(K)).float()
    assert torch.equal(result.w_hat, (result.scales[..., None] * (codes - zeros)).view(N, K))


# K, options
PRUNE_CASES = {
    "layer": (320, {"sparsity": 0.5}),
    "row": (320, {"sparsity": 0.7, "scope": "row"}),
    "2_4": (320, {"pattern": (2, 4)}),
    "3_5": (320, {"pattern": (3, 5)}),
    "4_8": (320, {"pattern": (4, 8)}),
    "joint": (320, {"sparsity": 0.5, "fmt": QuantFormat(4, 32, False)}),
    "joint_2_4_nf4": (256, {"pattern": (2, 4), "fmt": LutFormat("nf4", 64)}),
}


@pytest.mark.parametrize("case", PRUNE_CASES.values(), ids=PRUNE_CASES)
def test_obs_prune_of_experts(case, backend):
    K, options = case
    E, N = 3, 200
    w = torch.randn(E, N, K, device=DEVICE)
    x = torch.randn(E, 700, K, device=DEVICE) @ (
        torch.eye(K, device=DEVICE) + 0.3 * torch.randn(K, K, device=DEVICE) / K**0.5
    )
    H = 2 / 700 * x.mT @ x
    result, again = (ops.obs_prune(w, H, **options) for _ in range(2))
    assert torch.equal(result.w_hat, again.w_hat), "two runs differ"
    with use_backend("reference"):
        want = ops.obs_prune(w, H, **options)
    assert int(result.mask.sum()) == int(want.mask.sum())
    assert not result.w_hat[~result.mask].any()
    # Sums in another order turn an occasional near tie, and then what follows in that row.
    assert (result.mask == want.mask).all(2).float().mean() > 0.9
    torch.testing.assert_close(result.loss.sum(), want.loss.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("per_row", [False, True], ids=["layer", "row"])
def test_obs_prune_breaks_ties_by_column_then_row(per_row, backend):
    """An identity Hessian and weights of three sizes: the mask has one right answer."""
    w = torch.randint(1, 4, (1000, 128), device=DEVICE).float()
    H, scope = torch.eye(128, device=DEVICE), "row" if per_row else "layer"
    result = ops.obs_prune(w, H, sparsity=0.5, scope=scope)
    costs = w.square() if per_row else w.square().t().reshape(1, -1)
    order = torch.argsort(costs, dim=1, stable=True)[:, : costs.shape[1] // 2]
    keep = torch.ones_like(costs, dtype=torch.bool).scatter_(1, order, False)
    assert torch.equal(result.mask, keep if per_row else keep.view(128, 1000).t())


def test_kernels_run_on_the_callers_stream(backend):
    parts = weight(64, 128, 32)
    target = torch.randn(4, 128, device=DEVICE)
    x = torch.zeros_like(target)
    want = ops.w4a16_gemm(target, *parts, group_size=32)
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the default stream would read x before it is written
        x.copy_(target)
        out = ops.w4a16_gemm(x, *parts, group_size=32)
    stream.synchronize()
    assert torch.equal(out, want)


def test_a_device_that_is_not_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1)
    parts = weight(64, 128, 32)
    x = torch.randn(4, 128, device=DEVICE)
    want = ops.w4a16_gemm(x, *parts, group_size=32)
    moved = tuple(None if t is None else t.to(other) for t in parts)
    out = ops.w4a16_gemm(x.to(other), *moved, group_size=32)
    assert out.device == other
    assert torch.equal(out.to(DEVICE), want)
    assert torch.cuda.current_device() == DEVICE.index


def test_cuda_graph_capture(backend):
    parts = weight(64, 128, 32)
    x = torch.randn(4, 128, device=DEVICE)

    def step():
        return (
            ops.w4a16_gemm(x, *parts, group_size=32),
            ops.dequantize_int4(*parts, group_size=32),
        )

    step()  # compiles what is compiled at first use
    torch.cuda.synchronize(DEVICE)
    gc.collect()  # nothing may free device memory during the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for out, want in zip(captured, step(), strict=True):
        assert torch.equal(out, want)
