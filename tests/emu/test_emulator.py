"""The emulator itself: it runs correct kernels, and catches what it says it catches."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

THREADS = 96


@pytest.fixture
def run(library) -> Callable[..., str]:
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_bool]

    def run(name: str, data: Tensor, argument: int = 0, reverse: bool = False) -> str:
        return library.run(name.encode(), data.data_ptr(), argument, reverse).decode()

    return run


def counted() -> Tensor:
    return torch.arange(THREADS, dtype=torch.float32)


@pytest.mark.parametrize("reverse", [False, True])
def test_correct_kernels_run(reverse, run):
    data = counted()
    assert run("neighbour", data, 1, reverse) == ""
    assert torch.equal(data, counted().roll(-1))
    assert run("rotate_twice", data, 1, reverse) == ""
    assert torch.equal(data, counted().roll(-3))


@pytest.mark.parametrize("reverse", [False, True])
def test_warp_operations(reverse, run):
    data = counted()
    assert run("segmented_sums", data, 0, reverse) == ""
    want = counted().view(-1, 8).cumsum(1).flatten()
    want[16::32] = 0xAAAA
    assert torch.equal(data, want)


def test_coordinates(run):
    data = torch.zeros(6, 8)
    assert run("coordinates", data) == ""
    assert torch.equal(data, 100.0 * torch.arange(6)[:, None] + torch.arange(8))


def test_missing_barrier_reads_poison(run):
    data = counted()
    assert run("neighbour", data, 0) == ""
    assert data.isnan().any()


def test_missing_second_barrier_depends_on_the_order(run):
    forward, backward = counted(), counted()
    assert run("rotate_twice", forward, 0) == ""
    assert run("rotate_twice", backward, 0, True) == ""
    assert not torch.equal(forward, backward)


@pytest.mark.parametrize("at", [-1, THREADS, THREADS + 200])
def test_shared_memory_is_bounded(at, run):
    assert "write outside the shared array declared at" in run("shared_write", counted(), at)
    data = counted()
    assert run("shared_read", data, at) == ""
    assert data[0].isnan()


def test_dynamic_shared_memory(run):
    data = counted()
    assert run("dynamic_shared", data, 0) == ""
    assert torch.equal(data, counted().roll(-1))
    assert "declared at dynamic shared memory" in run("dynamic_shared", counted(), THREADS)


FAULTS = {
    "array_index": (THREADS, "array index out of range"),
    "barrier_in_a_branch": (0, r"divergent barrier: thread \(0, 0, 0\).*waits at.*\(32, 0, 0\)"),
    "barrier_after_an_exit": (0, r"divergent barrier:.*thread \(5, 0, 0\).*has ended"),
    "shuffle_without_a_lane": (0, "divergent warp:.*lanes of its mask that never come"),
    "shuffle_from_outside_the_mask": (0, "shuffle from a lane outside its mask"),
    "misaligned_vector": (1, "misaligned access"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors(name, run):
    argument, message = FAULTS[name]
    data = counted()
    error = run(name, data, argument)
    assert re.search(message, error), error
    assert run("neighbour", data, 1) == "", "the next launch is not affected"


def test_global_memory_is_bounded(run, guarded):
    data = guarded(counted())
    assert run("global_read", data, THREADS - 1) == ""
    assert "illegal memory access by thread (0, 0, 0)" in run("global_read", data, THREADS)


@pytest.mark.parametrize(("ctas", "threads"), [(1, 0), (1, 1025), (2**31, 32)], ids=str)
def test_launches_no_gpu_would_take_are_errors(ctas, threads, library):
    library.launch_with.restype = ctypes.c_char_p
    library.launch_with.argtypes = [ctypes.c_int64, ctypes.c_int]
    assert b"probe: " in library.launch_with(ctas, threads)


def test_conversions_equal_torchs(library):
    values = torch.cat(
        [
            torch.randn(5000) * torch.logspace(-9, 6, 5000),
            torch.arange(-70_000, 70_000, 7.5),
            torch.arange(4096) * 2.0**-26,  # around float16's subnormals and their ties
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.99, 65520.0, 3.4e38]),
        ]
    ).float()
    bf16, fp16 = torch.empty(2, len(values), dtype=torch.int16)
    n = ctypes.c_int64(len(values))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, bf16, fp16)]
    library.to_float16(*pointers, n)
    assert torch.equal(bf16, values.bfloat16().view(torch.int16))
    assert torch.equal(fp16, values.half().view(torch.int16))


def test_every_16_bit_pattern_widens_as_torchs_does(library):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    from_bf16, from_fp16 = torch.empty(2, len(bits))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, from_bf16, from_fp16)]
    library.from_float16(*pointers, ctypes.c_int64(len(bits)))
    for ours, dtype in ((from_bf16, torch.bfloat16), (from_fp16, torch.float16)):
        torch.testing.assert_close(ours, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` (float64, in the normal range) rounded once, to nearest, ties to even."""
    mantissa, exponent = torch.frexp(v)
    bits = 8 if dtype == torch.bfloat16 else 11
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_round_once(dtype, library):
    # Few exponents, so that float64 holds every result; many of them lie near a tie.
    a, b, c = (torch.randn(3, 40_000).abs() * 0.9 + 0.1).to(dtype)
    c *= torch.tensor([1.0, -1.0, 2.0**-9, 2.0**-12]).repeat(10_000).to(dtype)
    x, y, z = a.double(), b.double(), c.double()
    for op, want in enumerate((x + y, x - y, x * y, x * y + z)):
        out = torch.empty_like(a)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c, out)]
        library.arithmetic16(dtype == torch.bfloat16, op, *pointers, ctypes.c_int64(len(a)))
        normal = want.abs() > 2.0**-14
        assert normal.float().mean() > 0.99
        assert torch.equal(out.double()[normal], rounded(want, dtype)[normal])
