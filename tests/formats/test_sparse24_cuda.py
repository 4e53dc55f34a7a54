"""The CUDA kernel layouts of 2:4 sparse weights: exact inverses, and the picture in the docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.formats import sparse24_cuda
from llmkern.formats.int4 import unpack_codes, unpack_zeros
from llmkern.testing import random_sparse24_int4_weight, random_sparse24_weight


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 200),
    octets=st.integers(1, 50),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_canonical_comes_back(N, octets, dtype):
    values, meta = random_sparse24_weight(N, 8 * octets, dtype)
    packed = sparse24_cuda.to_cuda_layout(values, meta)
    assert packed[0].shape == sparse24_cuda.cuda_shape(N, 8 * octets)
    back = sparse24_cuda.from_cuda_layout(*packed)
    assert back[0].dtype == dtype
    assert torch.equal(back[0], values)
    assert torch.equal(back[1], meta)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 200),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 160, 256]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_canonical_codes_come_back(N, groups, group_size, symmetric, dtype):
    weight = random_sparse24_int4_weight(
        N, groups * group_size, group_size, symmetric=symmetric, scale_dtype=dtype
    )
    packed = sparse24_cuda.int4_to_cuda_layout(*weight, group_size)
    assert sparse24_cuda.is_symmetric(packed[0], packed[2], group_size) == symmetric
    back = sparse24_cuda.int4_from_cuda_layout(*packed, group_size)
    for ours, original in zip(back, weight, strict=True):
        if original is None:
            assert ours is None
        else:
            assert ours.dtype == original.dtype
            assert torch.equal(ours, original)


def places(N, K):
    """Every group of 4 columns: n, group, tile, chunk, half, step, strip, lane, pair of the lane."""
    for n in range(0, N, 3):
        for group in range(K // 4):
            k = 4 * group
            step, column = k % 64 // 32, group % 8
            lane = 4 * (n % 8) + column % 4
            pair = n % 16 // 8 + 2 * (column // 4)
            yield n, group, n // 64, k // 128, k % 128 // 64, step, n % 64 // 16, lane, pair


def check_metadata(words, meta, place):
    n, group, tile, chunk, half, _, strip, lane, _ = place
    lane = lane // 4 * 4 + group % 16 // 4
    word = words[tile, chunk, half, strip * 32 + lane]
    nibble = int(word) >> (n % 16 // 8 * 16 + group % 4 * 4) & 15
    assert nibble == int(meta[n, group // 2]) >> group % 2 * 4 & 15


def test_values_are_where_the_picture_says():
    N, K = 70, 200
    values, meta = random_sparse24_weight(N, K, torch.float16)
    packed, _ = sparse24_cuda.to_cuda_layout(values, meta)
    halves = packed.view(torch.int32).unflatten(-1, (2, 1152))
    pairs = values.view(torch.int32)
    for place in places(N, K):
        n, group, tile, chunk, half, step, strip, lane, pair = place
        at = ((step * 4 + strip) * 32 + lane) * 4 + pair
        assert halves[tile, chunk, half, at] == pairs[n, group]
        check_metadata(halves[..., 1024:], meta, place)


@pytest.mark.parametrize("group_size", [32, 96, 128])
def test_codes_are_where_the_picture_says(group_size):
    N, K = 70, 2 * group_size
    qvalues, meta, scales, zeros = random_sparse24_int4_weight(
        N, K, group_size, symmetric=False, scale_dtype=torch.float16
    )
    packed, *_ = sparse24_cuda.int4_to_cuda_layout(qvalues, meta, scales, zeros, group_size)
    codes, points = unpack_codes(qvalues, 4, K // 2), unpack_zeros(zeros, 4, N)
    inline = 128 if group_size == 128 else 32
    halves = packed[..., :3072].contiguous().view(torch.int32).unflatten(-1, (2, 384))
    grids = packed[..., 3072 : 3072 + 128 * (128 // inline)].contiguous().view(torch.float16)
    offsets = packed[..., 3072 + 128 * (128 // inline) :]
    for place in places(N, K):
        n, group, tile, chunk, half, step, strip, lane, pair = place
        word = int(halves[tile, chunk, half, (strip * 32 + lane) * 2 + step])
        assert word >> 4 * pair & 15 == codes[n, 2 * group]
        assert word >> 4 * pair + 16 & 15 == codes[n, 2 * group + 1]
        check_metadata(halves[..., 256:], meta, place)
        k = 4 * group
        at = k % 128 // inline * 64 + n % 64 // 16 * 16 + n % 8 * 2 + n % 16 // 8
        assert grids[tile, chunk, at] == scales[n, k // group_size]
        assert offsets[tile, chunk, at] == points[n, k // group_size]


def test_padding_keeps_the_first_two_and_is_zero():
    values, meta = torch.ones(1, 4).bfloat16(), torch.full((1, 1), 0xEE, dtype=torch.uint8)
    packed, _ = sparse24_cuda.to_cuda_layout(values, meta)
    halves = packed.view(torch.uint8).unflatten(-1, (2, 4608))
    assert (halves[..., :4096].contiguous().view(torch.bfloat16) != 0).sum() == 4
    assert halves[..., 4096:].unique(return_counts=True)[1].tolist() == [1023, 1]


class Recorder(TorchDispatchMode):
    """The operations that run, in order, and which of them gave each piece of memory."""

    def __init__(self):
        super().__init__()
        self.names, self.made_by = [], {}
        self.kept = []  # so that no memory is given out twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.made_by:
            self.made_by[out.untyped_storage().data_ptr()] = len(self.names)
            self.names.append(func.name())
        return out


@pytest.mark.parametrize("codes", [False, True], ids=["values", "codes"])
def test_the_packers_last_grid_does_not_write_the_weight(codes):
    """The CUDA kernels read a weight while the stream's previous grid may still run."""
    weight = random_sparse24_weight(70, 96, torch.bfloat16)
    if codes:
        weight = *random_sparse24_int4_weight(70, 96, 32), 32
    pack = sparse24_cuda.int4_to_cuda_layout if codes else sparse24_cuda.to_cuda_layout
    with Recorder() as record:
        packed = pack(*weight)[0]
    assert record.made_by[packed.untyped_storage().data_ptr()] < len(record.names) - 1


def test_bad_input_is_refused():
    values, meta = random_sparse24_weight(4, 32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"values: got torch.float32, expected bfloat16"):
        sparse24_cuda.to_cuda_layout(values.float(), meta)
    with pytest.raises(ValueError, match=r"values, meta: got \[4, 16, 4, 3\], expected"):
        sparse24_cuda.to_cuda_layout(values, meta[:, :3])
    packed = sparse24_cuda.to_cuda_layout(values, meta)
    with pytest.raises(ValueError, match=r"values: got \[1, 1, 4607\], expected \[1, 1, 4608\]"):
        sparse24_cuda.from_cuda_layout(packed[0][..., 1:], packed[1])


@pytest.mark.parametrize("group_size", [0, 16, 64])
def test_bad_groups_are_refused(group_size):
    weight = random_sparse24_int4_weight(4, 96, 32)
    with pytest.raises(ValueError, match=rf"group_size, qvalues, meta: got {group_size}, \[4, 6\]"):
        sparse24_cuda.int4_to_cuda_layout(*weight, group_size)
    packed = sparse24_cuda.int4_to_cuda_layout(*weight, 32)
    with pytest.raises(ValueError, match=rf"group_size, qvalues: got {group_size} and \[1, 1, 4"):
        sparse24_cuda.int4_from_cuda_layout(*packed[:2], packed[2].repeat(3, 1), None, group_size)
