"""The 2:4 sparse products over the CUDA layout in the emulator: every tier, on sm_80 and sm_90."""

from __future__ import annotations

import pytest
import torch

from llmkern import _backends, use_backend
from llmkern.formats.int4 import pack_zeros
from llmkern.formats.sparse24 import NIBBLES, compress, compress_codes
from llmkern.ops import _sparse24_config
from llmkern.ops._sparse24_config import select_config
from llmkern.testing import SPARSE24_CASES, Sparse24Case, relative_error

BF16, F16 = torch.bfloat16, torch.float16
halves = pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
kinds = pytest.mark.parametrize("group_size", [None, 32], ids=["values", "codes"])


@pytest.fixture(
    params=[pytest.param(80, marks=pytest.mark.slow), 90],
    ids=["sm80", "sm90"],
)
def sm(request, emulator, monkeypatch):
    """Large tiles from 257 rows on, however few there are."""
    monkeypatch.setattr(_backends, "cuda_capability", lambda device: request.param)
    monkeypatch.setattr(_sparse24_config, "_SMS", {True: 1, False: 1})
    return request.param


@halves
@pytest.mark.parametrize("case", SPARSE24_CASES.values(), ids=SPARSE24_CASES)
def test_values(case, dtype, sm, both_orders, guarded):
    weight = case.weight(dtype)
    first, *shapes = case.pack(weight)
    packed = guarded(first), *shapes
    x, bias = guarded(torch.randn(case.M, case.K).to(dtype)), guarded(torch.randn(case.N).to(dtype))
    out = both_orders(lambda: case.multiply(x, packed, bias, "cuda"))
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    case.check(out, x, weight, bias, slack=4)


@pytest.mark.slow
@halves
@kinds
@pytest.mark.parametrize("rows", [8, 16, 32, 64, 320])
def test_unit_vectors_return_the_weight_bit_for_bit(rows, group_size, dtype, sm):
    case = Sparse24Case(rows, 70, 320, group_size, False)
    weight = case.weight(dtype)
    packed = case.pack(weight)
    eye = torch.eye(case.K, dtype=dtype)
    out = torch.cat([case.multiply(x, packed, None, "cuda") for x in eye.split(rows)])
    assert torch.equal(out.t(), case.dense(weight, dtype))


@kinds
@pytest.mark.parametrize("M", [1, 257])
def test_every_pattern_in_every_place(M, group_size, sm):
    """Group g of row n keeps pattern (n + g) mod 6: both selectors meet all of them in every lane."""
    case = Sparse24Case(M, 48, 192, group_size)
    which = (torch.arange(case.N)[:, None] + torch.arange(case.K // 4)) % 6
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8)[which]
    meta = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    first, _, *grids = case.weight(BF16)
    weight = (first, meta, *grids)
    x = torch.randn(M, case.K).to(BF16)
    out = case.multiply(x, case.pack(weight), None, "cuda")
    case.check(out, x, weight, slack=4)


@pytest.mark.parametrize("M", [2, 257])
def test_groups_with_fewer_than_two_values(M, sm):
    case = Sparse24Case(M, 40, 136)
    w = torch.randn(case.N, case.K) * (torch.rand(case.N, case.K // 4, 4) < 0.2).flatten(1)
    w.view(case.N, -1, 4)[(w.view(case.N, -1, 4) != 0).sum(-1) > 2] = 0
    weight = compress(w.to(BF16))
    x = torch.randn(M, case.K).to(BF16)
    case.check(case.multiply(x, case.pack(weight), None, "cuda"), x, weight, slack=4)


@pytest.mark.parametrize("M", [2, 257])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_kept_code_0_is_not_pruned(kept, M, sm):
    """All codes 0 and all zero points 3: -3 scales where kept, 0 elsewhere."""
    case = Sparse24Case(M, 40, 128, 32, False)
    mask = torch.zeros(case.N, case.K // 4, 4, dtype=torch.bool)
    mask[..., :kept] = True
    mask = mask[..., torch.randperm(4)].flatten(1)
    points = torch.full((case.N, case.K // 32), 3, dtype=torch.uint8)
    codes = torch.zeros(case.N, case.K, dtype=torch.uint8)
    weight = *compress_codes(codes, mask, points), torch.ones(case.N, 4), pack_zeros(points, 4)
    columns = torch.arange(M) % case.K
    x = torch.eye(case.K).to(BF16)[columns]
    out = case.multiply(x, case.pack(weight), None, "cuda")
    assert torch.equal(out.t(), -3 * mask.to(BF16)[:, columns])


@halves
@kinds
def test_a_row_depends_on_no_other(group_size, dtype, sm):
    case = Sparse24Case(80, 64, 1152, group_size)
    packed = case.pack(case.weight(dtype))
    x = torch.randn(80, case.K).to(dtype)
    assert select_config(1, 64, 1152, sm).split == 2
    whole = case.multiply(x[:32], packed, None, "cuda")
    for rows in (slice(0, 1), slice(5, 13), slice(7, 20)):
        assert torch.equal(case.multiply(x[rows], packed, None, "cuda"), whole[rows])
    tiles = case.multiply(x, packed, None, "cuda")
    assert torch.equal(case.multiply(x[20:60], packed, None, "cuda"), tiles[20:60])


@halves
@pytest.mark.parametrize("M", [4, 40], ids=["decode", "tile"])
def test_error_of_codes_is_below_that_of_torch_on_the_rounded_weight(M, dtype, sm):
    errors = []
    for _ in range(3):
        case = Sparse24Case(M, 96, 640, 64, False)
        weight = case.weight(dtype)
        x = torch.randn(M, 640).to(dtype)
        out = case.multiply(x, case.pack(weight), None, "cuda")
        want = x.double() @ case.dense(weight, torch.float64).t()
        like = torch.nn.functional.linear(x, case.dense(weight, dtype))
        errors.append((relative_error(out, want), relative_error(like, want)))
    ours, torchs = torch.tensor(errors).mean(0).tolist()
    assert ours < torchs


@kinds
@pytest.mark.parametrize("M", [5, 257])
def test_nan_in_x_stays_in_its_row(M, group_size, sm):
    case = Sparse24Case(M, 64, 160, group_size)
    packed = case.pack(case.weight(BF16))
    x = torch.randn(M, 160).to(BF16)
    clean = case.multiply(x, packed, None, "cuda")
    x[2, 4:8] = float("nan")  # a whole group: each row of w keeps two of it
    out = case.multiply(x, packed, None, "cuda")
    assert out[2].isnan().all()
    others = torch.arange(M) != 2
    assert torch.equal(out[others], clean[others])


@kinds
@pytest.mark.parametrize("stride", [163, 168], ids=["odd_stride", "vector_stride"])
def test_rows_of_x_lie_apart(stride, group_size, sm):
    case = Sparse24Case(5, 64, 160, group_size)
    packed = case.pack(case.weight(BF16))
    x = torch.randn(5, stride).to(BF16)[:, :160]
    out = case.multiply(x, packed, None, "cuda")
    assert torch.equal(out, case.multiply(x.contiguous(), packed, None, "cuda"))


@pytest.mark.parametrize("nibble", [0x0, 0x1, 0x5, 0x6])
def test_metadata_that_name_no_two_columns_are_undefined(nibble, emulator):
    """The emulator stops where the instruction's result would be undefined."""
    case = Sparse24Case(1, 64, 128)
    values, meta = case.weight(BF16)
    meta[5, 9] = 0x40 | nibble
    with pytest.raises(RuntimeError, match="metadata that do not name two of four in order"):
        case.multiply(torch.ones(1, 128).to(BF16), case.pack((values, meta)), None, "cuda")


@kinds
def test_opcheck_and_gradient(group_size, emulator):
    case = Sparse24Case(3, 70, 96, group_size, False)
    weight = case.weight(BF16)
    packed = case.pack(weight)
    x = torch.randn(3, 96).to(BF16).requires_grad_()
    bias = torch.randn(70).to(BF16).requires_grad_()
    ops, args = torch.ops.llmkern, (x, *packed, bias)
    if group_size is None:
        torch.library.opcheck(ops.sparse24_gemm.default, (*args, "cuda"))
    else:
        torch.library.opcheck(ops.sparse24_w4a16_gemm.default, (*args, group_size, "cuda"))
    case.multiply(x, packed, None, "cuda").sum().backward()
    want = torch.ones(3, 70, dtype=BF16) @ case.dense(weight, BF16)
    torch.testing.assert_close(x.grad, want)


@kinds
def test_what_is_refused(group_size, emulator):
    case = Sparse24Case(2, 64, 128, group_size)
    weight = case.weight(BF16)
    x = torch.randn(2, 128).to(BF16)
    with pytest.raises(NotImplementedError, match="cuda: the weight is in the canonical layout"):
        case.multiply(x, weight)
    packed = case.pack(weight)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="in the cuda layout"):
        case.multiply(x, packed, None, "cuda")
    if group_size is not None:
        with pytest.raises(NotImplementedError, match="cuda: x is float32"):
            case.multiply(x.float(), packed, None, "cuda")
        with use_backend("reference"):
            out = case.multiply(x.float(), packed, None, "cuda")
        case.check(out, x.float(), weight)
        return
    with pytest.raises(ValueError, match=r"values: got float32 .* expected bfloat16 or float16"):
        case.multiply(x.float(), (packed[0].float(), packed[1]), None, "cuda")


def test_the_split_never_follows_from_m():
    for N, K in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (64, 128), (8, 100_000)):
        for sm in (80, 86, 90):
            configs = [select_config(M, N, K, sm) for M in range(1, 33)]
            assert {c.tier for c in configs} == {"decode"}
            assert len({c.split for c in configs}) == 1
            assert all(c.rows >= M for M, c in enumerate(configs, 1))


def test_tiers_begin_where_documented():
    tiers = [select_config(M, 14336, 4096, 90).tier for M in (32, 33, 256, 257, 4096)]
    assert tiers == ["decode", "tile", "tile", "large", "large"]
    # Eight columns of 128 by three rows of tiles would leave most multiprocessors idle.
    assert select_config(300, 1024, 4096, 90).tier == "tile"
    assert select_config(1, 4096, 4096, 90).bulk
    assert not select_config(1, 4096, 4096, 89).bulk
