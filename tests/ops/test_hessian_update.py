from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmkern
from llmkern.ops import hessian_update
from llmkern.testing import assert_matches, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# id: (T, K); the hazard is the id
CASES = {
    "one_number": (1, 1),
    "t_1": (1, 200),
    "k_below_a_strip": (70, 7),
    "k_tail": (65, 130),
    "one_block": (64, 128),
    "several_blocks": (300, 300),
    "t_tail_of_chunk": (129, 96),
    "t_beyond_flush": (2050, 65),
}


def lower(T: torch.Tensor) -> torch.Tensor:
    return T.tril()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K"), CASES.values(), ids=CASES.keys())
def test_values(backend, T, K, dtype):
    x = torch.randn(T, K).to(dtype)
    start = torch.randn(K, K)
    H = start.clone()
    hessian_update(H, x, 2 / 7)
    spec = start.double() + 2 / 7 * (x.double().t() @ x.double())
    like = start + 2 / 7 * (x.float().t() @ x.float())
    assert_matches(lower(H), lower(spec), lower(like))
    assert torch.equal(H.triu(1), start.triu(1)), "the upper triangle was written"


def test_long_sums_keep_their_precision(backend):
    # All products positive: a running float32 sum would drift by 1e-4.
    x = (torch.rand(100_000, 24) + 0.5).bfloat16()
    H = torch.zeros(24, 24)
    hessian_update(H, x, 2 / len(x))
    spec = (x.double().t() @ x.double()).mul_(2 / len(x))
    assert relative_error(lower(H), lower(spec)) < 1e-6


def test_calls_add_up(backend):
    x = torch.randn(90, 40)
    H, once = torch.zeros(40, 40), torch.zeros(40, 40)
    hessian_update(once, x, 2 / 90)
    for part in (x[:1], x[1:64], x[64:]):
        hessian_update(H, part, 2 / 90)
    torch.testing.assert_close(H, once, rtol=1e-5, atol=1e-6)


def test_half_products_are_exact(backend):
    # Every finite fp16 magnitude, subnormals included; bf16 whose squares are normal floats.
    half = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    brain = torch.arange(0x2000, 0x5F00, dtype=torch.int16).view(torch.bfloat16)
    for values in (half, brain):
        for x in values.split(256):
            H = torch.zeros(len(x), len(x))
            hessian_update(H, x[None], 1.0)
            assert torch.equal(H.diagonal(), x.float().square())


def test_leading_dimensions_and_strides(backend):
    wide = torch.randn(3, 5, 2 * 20)
    x = wide[..., ::2]
    H, flat = torch.zeros(20, 20), torch.zeros(20, 20)
    hessian_update(H, x, 1.0)
    hessian_update(flat, x.reshape(-1, 20).contiguous(), 1.0)
    assert torch.equal(H, flat)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_have_the_bits_of_each_alone(backend, dtype):
    x = torch.randn(3, 2, 35, 20).to(dtype)
    H = torch.ones(3, 20, 20)
    hessian_update(H, x, 0.5)
    flat = torch.ones(3, 20, 20)
    hessian_update(flat, x.view(-1, 20), 0.5, torch.tensor([0, 70, 140, 210]))
    assert torch.equal(H, flat)
    for part, rows in zip(H, x, strict=True):
        alone = torch.ones(20, 20)
        hessian_update(alone, rows, 0.5)
        assert torch.equal(part, alone)


def test_experts_of_any_number_of_rows(backend):
    x, offsets = torch.randn(90, 7), torch.tensor([5, 5, 60, 61, 90])
    H = torch.zeros(4, 7, 7)
    hessian_update(H, x, 0.5, offsets)
    for part, begin, end in zip(H, offsets[:-1], offsets[1:], strict=True):
        torch.testing.assert_close(part, (x[begin:end].t() @ x[begin:end] / 2).tril())


def test_no_rows_change_nothing(backend):
    H = torch.randn(4, 4)
    before = H.clone()
    hessian_update(H, torch.randn(0, 4), 1.0)
    assert torch.equal(H, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_shows_on_the_diagonal(backend, bad):
    x = torch.randn(50, 33)
    x[17, 5] = bad
    H = torch.zeros(33, 33)
    hessian_update(H, x, 1.0)
    finite = torch.isfinite(H.diagonal())
    assert not finite[5]
    assert int(finite.sum()) == 32


def test_same_bits_for_any_number_of_threads():
    x = torch.randn(3000, 150)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.zeros(150, 150))
            with llmkern.use_backend("cpu"):
                hessian_update(results[-1], x, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    T=st.integers(1, 200),
    K=st.integers(1, 170),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_any_shape(backend, T, K, dtype, seed):
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    H = torch.zeros(K, K)
    hessian_update(H, x, 0.5)
    spec, like = x.double().t() @ x.double() / 2, x.float().t() @ x.float() / 2
    assert_matches(lower(H), lower(spec), lower(like))


def test_opcheck(backend):
    args = (torch.zeros(9, 9), torch.randn(5, 9), 0.5)
    torch.library.opcheck(torch.ops.llmkern.hessian_update.default, args)
    args = (torch.zeros(2, 9, 9), torch.randn(5, 9), 0.5, torch.tensor([0, 2, 5]))
    torch.library.opcheck(torch.ops.llmkern.hessian_update.default, args)


def test_compiles_without_graph_breaks(backend):
    x = torch.randn(8, 6)
    H, eager = torch.zeros(6, 6), torch.zeros(6, 6)
    compiled = torch.compile(hessian_update, fullgraph=True, backend="aot_eager")
    compiled(H, x, 0.5)
    hessian_update(eager, x, 0.5)
    assert torch.equal(H, eager)


@pytest.mark.parametrize(
    ("H", "x", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.float64), "x: got float64"),
        (torch.zeros(4, 4), torch.zeros(3, 5), r"H: got float32 \[4, 4\].*\[5, 5\]"),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4), "H: got float64"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(3, 4), "H: got .*contiguous"),
        (torch.zeros(4, 4, device="meta"), torch.zeros(3, 4), "device"),
    ],
    ids=["x_dtype", "k_differs", "h_dtype", "h_strided", "device"],
)
def test_bad_arguments_are_named(H, x, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        hessian_update(H, x, 1.0)


@pytest.mark.parametrize(
    ("H", "x", "offsets", "message"),
    [
        ((2, 4, 4), (3, 5, 4), None, r"H: got float32 \[2, 4, 4\].*\[3, 4, 4\]"),
        ((2, 4, 4), (6,), None, r"x: got float32 .*\[E, T, K\]"),
        ((2, 4, 4), (6, 4), [0, 3], r"offsets: got int64 \[2\].*\[E \+ 1\]"),
        ((4, 4), (6, 4), [0, 6], r"offsets: got int64 \[2\].*H \[E, K, K\]"),
        ((2, 4, 4), (6, 4), [0, 3, 7], r"offsets: got \[0, 3, 7\], .* 0 to 6"),
        ((2, 4, 4), (6, 4), [-1, 3, 6], r"offsets: got \[-1, 3, 6\]"),
        ((2, 4, 4), (6, 4), [0, 5, 4], r"offsets: got \[0, 5, 4\], expected them to ascend"),
    ],
    ids=["e_differs", "x_1d", "few_offsets", "one_h", "beyond_x", "negative", "descending"],
)
def test_bad_experts_are_named(H, x, offsets, message):
    H, before = torch.zeros(H), torch.zeros(H)
    with pytest.raises(ValueError, match=message):
        hessian_update(H, torch.ones(x), 1.0, None if offsets is None else torch.tensor(offsets))
    assert torch.equal(H, before)
