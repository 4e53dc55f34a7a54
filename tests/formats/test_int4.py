"""The canonical packed layout: round trips, the bit stream itself, and compressed-tensors' bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.int4 import (
    BITS,
    QuantFormat,
    pack_codes,
    pack_zeros,
    unpack_codes,
    unpack_zeros,
)

bits_shapes = given(
    bits=st.sampled_from(BITS), N=st.integers(1, 9), K=st.integers(1, 70), seed=st.integers(0, 99)
)


def random_codes(N, K, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@bits_shapes
def test_codes_come_back(bits, N, K, seed):
    codes = random_codes(N, K, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (N, -(-K * bits // 32))
    assert torch.equal(unpack_codes(packed, bits, K), codes)


@settings(max_examples=40, deadline=None)
@bits_shapes
def test_zeros_come_back(bits, N, K, seed):
    zeros = random_codes(N, K, bits, seed)
    packed = pack_zeros(zeros, bits)
    assert packed.shape == (-(-N * bits // 32), K)
    assert packed.is_contiguous()
    assert torch.equal(unpack_zeros(packed, bits, N), zeros)


@settings(max_examples=30, deadline=None)
@bits_shapes
def test_packed_is_a_bit_stream(bits, N, K, seed):
    codes = random_codes(N, K, bits, seed)
    stream = sum(int(code) << (k * bits) for k, code in enumerate(codes[0]))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-K * bits // 32))]
    assert [int(word) & 0xFFFFFFFF for word in pack_codes(codes, bits)[0]] == words


@pytest.mark.parametrize("K", [32, 64, 96, 50])
@pytest.mark.parametrize("bits", BITS)
def test_same_bytes_as_compressed_tensors(bits, K):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(8, K, bits)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_codes(codes, bits), theirs)
    zeros = helpers.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_zeros(codes, bits), zeros)


ERRORS = {
    "code_too_large": (lambda: pack_codes(torch.full((1, 8), 4, dtype=torch.uint8), 2), "codes"),
    "codes_not_uint8": (lambda: pack_codes(torch.zeros(1, 8), 4), "codes: got torch.float32"),
    "codes_not_a_matrix": (lambda: pack_codes(torch.zeros(8, dtype=torch.uint8), 4), "codes: got"),
    "packed_too_short": (
        lambda: unpack_codes(torch.zeros(1, 2, dtype=torch.int32), 4, 24),
        r"packed: got .*\[N, 3\]",
    ),
    "packed_not_int32": (
        lambda: unpack_codes(torch.zeros(1, 1, dtype=torch.int64), 4, 8),
        "packed: got torch.int64",
    ),
    "bits_unknown": (lambda: QuantFormat(bits=5), "bits: got 5"),
    "group_size_negative": (lambda: QuantFormat(group_size=-1), "group_size: got -1"),
    "group_size_does_not_divide": (
        lambda: QuantFormat(group_size=128).groups(192),
        "group_size: got 128, expected a divisor of K = 192",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
