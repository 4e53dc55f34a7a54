"""The CUDA kernel layout: exact inverse, and the picture in its docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.int4 import unpack_codes, unpack_zeros
from llmkern.formats.int4_cuda import from_cuda_layout, to_cuda_layout
from llmkern.testing import random_int4_weight


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 200),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 160, 256]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_canonical_comes_back(N, groups, group_size, symmetric, dtype):
    weight = random_int4_weight(
        N, groups * group_size, group_size, symmetric=symmetric, scale_dtype=dtype
    )
    back = from_cuda_layout(*to_cuda_layout(*weight, group_size), group_size)
    for ours, original in zip(back, weight, strict=True):
        if original is None:
            assert ours is None
        else:
            assert ours.dtype == original.dtype
            assert torch.equal(ours, original)


@pytest.mark.parametrize("group_size", [32, 96, 128])
def test_bytes_are_where_the_picture_says(group_size):
    N, K = 70, 2 * group_size
    qweight, scales, zeros = random_int4_weight(
        N, K, group_size, symmetric=False, scale_dtype=torch.float16
    )
    packed, shape, none = to_cuda_layout(qweight, scales, zeros, group_size)
    assert none is None
    assert shape.shape == (2, N)
    codes, points = unpack_codes(qweight, 4, K), unpack_zeros(zeros, 4, N)
    inline = 128 if group_size == 128 else 32
    words = packed[..., :4096].contiguous().view(torch.int32)
    values = packed[..., 4096 : 4096 + 128 * (128 // inline)].contiguous().view(torch.float16)
    offsets = packed[..., 4096 + 128 * (128 // inline) :]
    for n in range(0, N, 3):
        tile, strip, high_row, g = n // 64, n % 64 // 16, n % 16 // 8, n % 8
        for k in range(K):
            chunk, step, high_column, t = k // 128, k % 128 // 16, k % 16 // 8, k % 8 // 2
            v = 4 * high_column + 2 * high_row + k % 2
            word = words[tile, chunk, ((step // 4 * 4 + strip) * 32 + 4 * g + t) * 4 + step % 4]
            nibble = v // 2 + 4 * (v % 2)
            assert int(word) >> 4 * nibble & 15 == codes[n, k]
            at = k % 128 // inline * 64 + strip * 16 + 2 * g + high_row
            assert values[tile, chunk, at] == scales[n, k // group_size]
            assert offsets[tile, chunk, at] == points[n, k // group_size]


def test_padding_is_zero():
    packed, _, _ = to_cuda_layout(
        torch.full((1, 4), -1, dtype=torch.int32), torch.ones(1, 1), None, 32
    )
    assert packed.shape == (1, 1, 4096 + 4 * 64 * 4)
    ones = packed.view(torch.int32).flatten()
    assert (ones[:1024] != 0).sum() == 8
    assert (ones[1024:] != 0).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("convert", "qweight", "scales", "group_size", "message"),
    [
        (to_cuda_layout, torch.zeros(4, 6, dtype=torch.int32), (4, 1), 48, "48"),
        (to_cuda_layout, torch.zeros(4, 8, dtype=torch.int32), (4, 1), 32, r"\[4, 8\]"),
        (from_cuda_layout, torch.zeros(1, 1, 4096, dtype=torch.uint8), (1, 4), 32, r"4096\]"),
    ],
)
def test_bad_input_is_refused(convert, qweight, scales, group_size, message):
    with pytest.raises(ValueError, match=rf"group_size, qweight: got .*{message}"):
        convert(qweight, torch.ones(scales), None, group_size)
