"""2:4 formats: exact both ways, explicit masks, refusals that name the place, other layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.int4 import unpack_codes
from llmkern.formats.sparse24 import (
    NIBBLES,
    check_meta,
    compress,
    compress_codes,
    decompress,
    decompress_codes,
    is_sparse24,
    mask_of,
)
from llmkern.formats.sparse24_cpu import (
    from_cpu_layout,
    int4_from_cpu_layout,
    int4_to_cpu_layout,
    to_cpu_layout,
)
from llmkern.formats.sparse24_exchange import from_bitmask, from_torch, to_bitmask, to_torch
from llmkern.testing import random_sparse24_int4_weight, random_sparse24_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mask_with(sets: torch.Tensor) -> torch.Tensor:
    """bool [N, 4 G] of sets of kept columns as 4 bits [N, G]."""
    return ((sets[..., None] >> torch.arange(4)) & 1).bool().flatten(1)


SMALL_SETS = torch.tensor([s for s in range(16) if bin(s).count("1") <= 2])
PAIRS = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100])


@pytest.mark.parametrize("dtype", DTYPES)
@given(N=st.integers(0, 5), octets=st.integers(0, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_compress_and_back_is_exact(dtype: torch.dtype, N: int, octets: int, seed: int) -> None:
    torch.manual_seed(seed)
    sets = SMALL_SETS[torch.randint(0, len(SMALL_SETS), (N, 2 * octets))]
    w = torch.randn(N, 8 * octets).to(dtype) * mask_with(sets)
    values, meta = compress(w)
    assert values.dtype == dtype
    assert values.shape == (N, 4 * octets)
    assert meta.shape == (N, octets)
    check_meta(meta)
    assert torch.equal(decompress(values, meta), w)


def test_nibbles_are_those_of_the_hardware() -> None:
    w = torch.zeros(6, 8)
    w[:, 4:] = mask_with(PAIRS[:, None]).float() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    values, meta = compress(w)
    assert tuple((meta[:, 0] >> 4).tolist()) == NIBBLES
    assert values[:, 2:].tolist() == [[1, 2], [1, 3], [2, 3], [1, 4], [2, 4], [3, 4]]


def test_low_nibble_is_the_lower_group_and_short_groups_take_the_lowest_columns() -> None:
    w = torch.tensor([[0.0, 0, 0, 7, 0, 0, 0, 0]])
    values, meta = compress(w)
    assert meta.tolist() == [[0x4C]]  # columns 0 and 3, then 0 and 1
    assert values.tolist() == [[0, 7, 0, 0]]


def test_mask_decides_and_a_kept_zero_stays_kept() -> None:
    mask = mask_with(PAIRS[[0, 5]][None])
    values, meta = compress(torch.full((1, 8), 3.0), mask)
    assert torch.equal(decompress(values, meta), 3.0 * mask)
    values, meta = compress(torch.zeros(1, 8), mask)
    assert torch.equal(mask_of(meta), mask)
    w = torch.full((1, 8), float("nan"))
    w[mask] = 2.0
    values, meta = compress(w, torch.zeros(1, 8, dtype=torch.bool))
    assert values.tolist() == [[0, 0, 0, 0]]


def test_three_of_four_are_refused_with_their_place() -> None:
    w = torch.zeros(4, 16)
    w[2, 8:11] = 1
    w[3, :4] = 1
    with pytest.raises(ValueError, match=r"w: got 3 kept of 4 in row 2, columns 8 \.\. 11"):
        compress(w)
    crowded = torch.zeros(4, 16, dtype=torch.bool)
    crowded[3, :4] = True
    with pytest.raises(ValueError, match=r"mask: got 4 kept of 4 in row 3, columns 0 \.\. 3"):
        compress_codes(torch.zeros(4, 16, dtype=torch.uint8), crowded)
    assert not is_sparse24(w)


def test_shapes_and_dtypes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"w: got float32 \[2, 12\], expected .* multiple of 8"):
        compress(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"mask: got float32 \[2, 8\], expected bool \[2, 8\]"):
        compress(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"codes: got uint8 \[2, 8\], expected .* multiple of 16"):
        compress_codes(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values, meta: got \[2, 8\]"):
        decompress(torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"meta: got 0x5 in row 1, columns 4 \.\. 7"):
        check_meta(torch.tensor([[0x44], [0x54]], dtype=torch.uint8))


@given(
    N=st.integers(1, 9), words=st.integers(1, 6), symmetric=st.booleans(), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=25)
def test_codes_and_back_are_exact(N: int, words: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    K = 16 * words
    mask = mask_with(PAIRS[torch.randint(0, 6, (N, K // 4))])
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 16, (N, words), dtype=torch.uint8)
    qvalues, meta = compress_codes(codes, mask, zeros)
    assert qvalues.dtype == torch.int32
    assert qvalues.shape == (N, words)
    back, kept = decompress_codes(qvalues, meta, zeros)
    point = 8 if zeros is None else zeros.repeat_interleave(16, 1)
    assert torch.equal(kept, mask)
    assert torch.equal(back, torch.where(mask, codes, point).to(torch.uint8))
    assert torch.equal(unpack_codes(qvalues, 4, K // 2), codes[mask].view(N, -1))


def test_short_groups_of_codes_are_filled_with_the_zero_point() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 2] = True  # a kept code 0
    zeros = torch.tensor([[5]], dtype=torch.uint8)
    qvalues, meta = compress_codes(codes, mask, zeros)
    assert unpack_codes(qvalues, 4, 8).tolist() == [[5, 0, 5, 5, 5, 5, 5, 5]]
    assert meta.tolist() == [[0x48, 0x44]]
    assert decompress_codes(qvalues, meta, zeros)[0].tolist() == [[5, 5, 0] + [5] * 13]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(16, 32), (48, 96), (32, 4096)])
def test_cpu_layout_and_back_is_exact(dtype: torch.dtype, N: int, K: int) -> None:
    values, meta = random_sparse24_weight(N, K, dtype)
    kernel = to_cpu_layout(values, meta)
    assert kernel[0].shape == (N // 16, K // 4, 32)
    for got, wanted in zip(from_cpu_layout(*kernel), (values, meta), strict=True):
        assert torch.equal(got, wanted)
    # Row 3 of block 1 or 0, its second kept value of group 5.
    n = min(N, 32) - 13
    block = kernel[0][n // 16, 5]
    pair = block.view(16, 2)[3] if dtype == torch.bfloat16 else block.view(2, 16)[:, 3]
    assert torch.equal(pair, values[n, 10:12])


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_cpu_layout_and_back_is_exact(symmetric: bool) -> None:
    weight = random_sparse24_int4_weight(48, 192, 96, symmetric=symmetric)
    kernel = int4_to_cpu_layout(*weight, 96)
    for got, wanted in zip(int4_from_cpu_layout(*kernel, 96), weight, strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)
    codes = unpack_codes(weight[0], 4, 96)
    word = int(kernel[0][1, 2, 5]) & 0xFFFFFFFF  # row 21, kept codes 16 .. 23
    assert [word >> (4 * i) & 15 for i in (0, 4, 1, 5)] == codes[21, 16:20].tolist()


def test_cpu_layout_refuses_what_does_not_fill_its_blocks() -> None:
    with pytest.raises(ValueError, match=r"N = 17, K = 32, expected multiples of 16 and 32"):
        to_cpu_layout(*random_sparse24_weight(17, 32, torch.float32))
    with pytest.raises(ValueError, match=r"N = 16, K = 40"):
        to_cpu_layout(*random_sparse24_weight(16, 40, torch.float32))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(32, 64), (96, 192)])
def test_torch_cutlass_tensor_both_ways(dtype: torch.dtype, N: int, K: int) -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, meta = random_sparse24_weight(N, K, dtype)
    values = torch.where(values == 0, torch.ones_like(values), values)
    dense = decompress(values, meta)
    ours = to_torch(values, meta)
    assert torch.equal(ours.to_dense(), dense)
    packed, reordered = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.meta, reordered)
    for got, wanted in zip(from_torch(ours), (values, meta), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torch_float32_tensor_keeps_one_of_two() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    choice = torch.randint(0, 2, (32, 32))
    w = torch.zeros(32, 32, 2).scatter_(2, choice[..., None], torch.randn(32, 32, 1)).view(32, 64)
    packed, reordered = sparse_semi_structured_from_dense_cutlass(w)
    theirs = Cutlass(w.shape, packed, reordered, None, None, None)
    values, meta = from_torch(theirs)
    assert torch.equal(decompress(values, meta), w)
    ours = to_torch(values, meta)
    assert torch.equal(ours.meta, reordered)
    values, meta = random_sparse24_weight(32, 64, torch.float32)
    with pytest.raises(ValueError, match=r"meta: got 2 kept of 2 in row 0"):
        to_torch(values, meta)
    with pytest.raises(ValueError, match="sparse: got Tensor"):
        from_torch(w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmask_both_ways(dtype: torch.dtype) -> None:
    values, meta = random_sparse24_weight(6, 40, dtype)
    tensors = to_bitmask(values, meta)
    assert tensors["shape"].shape == (2, 1)
    for row, byte, bit in itertools.product((0, 5), (0, 4), range(8)):
        kept = bool(tensors["bitmask"][row, byte] >> bit & 1)
        assert kept == bool(mask_of(meta)[row, 8 * byte + bit])
    for got, wanted in zip(from_bitmask(tensors), (values, meta), strict=True):
        assert torch.equal(got, wanted)
    tensors["bitmask"][3, 1] = 0b00010011
    with pytest.raises(ValueError, match=r"bitmask: got 1 kept of 4 in row 3, columns 12 \.\. 15"):
        from_bitmask(tensors)
    del tensors["bitmask"]
    with pytest.raises(ValueError, match="got no bitmask"):
        from_bitmask(tensors)
