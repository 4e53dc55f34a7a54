"""The CPU kernel layout: exact inverse, the picture in its docstring, memory that copies as any other."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern._memory import HUGE_PAGE, empty_huge
from llmkern.formats.int4 import unpack_codes, unpack_zeros
from llmkern.formats.int4_cpu import from_cpu_layout, to_cpu_layout
from llmkern.testing import random_int4_weight


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 200),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 96, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_canonical_comes_back(N, groups, group_size, symmetric, dtype):
    weight = random_int4_weight(
        N, groups * group_size, group_size, symmetric=symmetric, scale_dtype=dtype
    )
    back = from_cpu_layout(*to_cpu_layout(*weight, group_size), group_size)
    for ours, original in zip(back, weight, strict=True):
        if original is None:
            assert ours is None
        else:
            assert ours.dtype == original.dtype
            assert torch.equal(ours, original)


def test_bytes_are_where_the_picture_says():
    N, K = 130, 64
    qweight, scales, zeros = random_int4_weight(N, K, 32, symmetric=False)
    packed, kernel_scales, kernel_zeros = to_cpu_layout(qweight, scales, zeros, 32)
    codes = unpack_codes(qweight, 4, K)
    for n in range(N):
        row = n % 64
        dword, high = row // 32 * 16 + row % 16, row % 32 >= 16
        for k in range(K):
            byte = packed[n // 64, k // 4 * 128 + dword * 4 + k % 4]
            assert (int(byte) >> 4 if high else int(byte) & 15) == codes[n, k]
    assert torch.equal(kernel_scales, scales.t())
    assert torch.equal(kernel_zeros, unpack_zeros(zeros, 4, N).t())


def test_rows_beyond_n_hold_code_zero():
    packed, _, _ = to_cpu_layout(
        torch.full((1, 4), -1, dtype=torch.int32), torch.ones(1, 1), None, 32
    )
    assert (packed.view(-1, 4) != 0).any(1).nonzero().flatten().tolist() == list(range(0, 256, 32))


ERRORS = {
    "to_group_size_not_a_multiple": (to_cpu_layout, torch.int32, (4, 6), (4, 1), 48, "48"),
    "to_shapes_disagree": (to_cpu_layout, torch.int32, (4, 8), (4, 1), 32, r"\[4, 8\]"),
    "from_shapes_disagree": (from_cpu_layout, torch.uint8, (2, 1024), (1, 4), 32, r"\[2, 1024\]"),
}


@pytest.mark.parametrize(
    ("convert", "dtype", "shape", "scales_shape", "group_size", "message"),
    ERRORS.values(),
    ids=ERRORS,
)
def test_bad_input_is_refused(convert, dtype, shape, scales_shape, group_size, message):
    with pytest.raises(ValueError, match=rf"group_size, qweight: got .*{message}"):
        convert(torch.zeros(shape, dtype=dtype), torch.ones(scales_shape), None, group_size)


@pytest.mark.parametrize("size", [16, HUGE_PAGE + 64], ids=["small", "huge"])
def test_memory_behaves_as_any_tensors(size):
    expected = (torch.arange(size) % 251).to(torch.uint8).view(-1, 4)
    t = empty_huge(expected.shape, torch.uint8).copy_(expected)
    saved = io.BytesIO()
    torch.save(t, saved)
    saved.seek(0)
    copies = [copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.clone(), torch.load(saved)]
    view = t[1:]
    del t
    for other in copies:
        assert torch.equal(other, expected)
    assert torch.equal(view, expected[1:])


def test_huge_memory_is_aligned_to_its_pages():
    assert empty_huge((HUGE_PAGE + 1,), torch.uint8).data_ptr() % HUGE_PAGE == 0


def test_huge_memory_counts_as_what_it_holds():
    t = empty_huge((HUGE_PAGE + 1,), torch.uint8)
    assert t.untyped_storage().nbytes() == t.nbytes
