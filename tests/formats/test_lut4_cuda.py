"""The CUDA kernel layout of look-up-table weights: exact inverse, and the picture in its docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.int4 import unpack_codes
from llmkern.formats.lut4_cuda import from_cuda_layout, to_cuda_layout
from llmkern.testing import CodeCase


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 200),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 160, 256]),
    values=st.sampled_from(["nf4", "tensor", "row", "group"]),
    dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
)
def test_canonical_comes_back(N, groups, group_size, values, dtype):
    weight = CodeCase(1, N, groups * group_size, group_size, values, dtype).weight()
    packed = to_cuda_layout(*weight, group_size)
    assert packed[2].shape == (groups, N)
    assert packed[2].untyped_storage().nbytes() <= 4
    back = from_cuda_layout(*packed, group_size)
    for ours, original in zip(back, weight, strict=True):
        assert (ours is None) == (original is None)
        assert ours is None or (ours.dtype == original.dtype and torch.equal(ours, original))


@pytest.mark.parametrize("group_size", [32, 96, 128])
def test_bytes_are_where_the_picture_says(group_size):
    N, K = 70, 2 * group_size
    qweight, codebook, scales = CodeCase(1, N, K, group_size, "group", torch.float16).weight()
    packed, shape, _ = to_cuda_layout(qweight, codebook, scales, group_size)
    assert shape.shape == codebook.shape
    assert shape.untyped_storage().nbytes() == 4
    codes = unpack_codes(qweight, 4, K)
    inline = 128 if group_size == 128 else 32
    grids = 64 * (128 // inline)
    assert packed.shape[2] == 4096 + grids * (2 + 64)
    words = packed[..., :4096].contiguous().view(torch.int32)
    values = packed[..., 4096 : 4096 + 2 * grids].contiguous().view(torch.float16)
    books = packed[..., 4096 + 2 * grids :].contiguous().view(torch.float32)
    for n in range(0, N, 3):
        tile, strip, high_row, g = n // 64, n % 64 // 16, n % 16 // 8, n % 8
        for k in range(K):
            chunk, step, high_column, t = k // 128, k % 128 // 16, k % 16 // 8, k % 8 // 2
            v = 4 * high_column + 2 * high_row + k % 2
            word = words[tile, chunk, ((step // 4 * 4 + strip) * 32 + 4 * g + t) * 4 + step % 4]
            assert int(word) >> 4 * v & 15 == codes[n, k]
            group = k % 128 // inline
            at = group * 64 + strip * 16 + 2 * g + high_row
            assert values[tile, chunk, at] == scales[n, k // group_size]
            book = books[tile, chunk, (group * 64 + n % 64) * 16 :][:16]
            assert torch.equal(book, codebook[n, k // group_size])


@pytest.mark.parametrize(
    ("codebook", "scales", "group_size"),
    [((16,), (4, 2), 48), ((3, 16), (4, 2), 32), ((4, 3, 16), (4, 2), 32), ((16,), (4, 3), 32)],
)
def test_bad_input_is_refused(codebook, scales, group_size):
    weight = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(codebook), torch.ones(scales)
    with pytest.raises(ValueError, match="group_size, codebook, scales: got"):
        to_cuda_layout(*weight, group_size)


@pytest.mark.parametrize("size", [4095, 4096 + 128])
def test_chunks_of_another_size_are_refused(size):
    chunks = torch.zeros(1, 1, size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"group_size, qweight: got 32 and \[1, 1"):
        from_cuda_layout(chunks, torch.zeros(16), torch.ones(1, 4), 32)
