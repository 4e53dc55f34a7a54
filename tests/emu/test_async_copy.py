"""Asynchronous copies and clusters in the emulator: correct pipelines run, broken ones are caught."""

from __future__ import annotations

import ctypes
import re
from functools import partial

import pytest
import torch

THREADS, STAGES, STEPS = 64, 3, 7
KB = 1024
BOTH_ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture
def run(probe):
    return partial(probe, "async_copy_probe")


def problem():
    return torch.randn(STEPS, 4 * THREADS), torch.zeros(STEPS, 4 * THREADS)


@BOTH_ORDERS
@pytest.mark.parametrize("name", ["cp_async", "bulk_copy"])
def test_pipelines_deliver(name, reverse, run):
    a, out = problem()
    assert run(name, out, a, reverse=reverse) == ""
    assert torch.equal(out, a)


@BOTH_ORDERS
def test_cp_async_without_a_wait_reads_poison(reverse, run):
    """And two copies to one place are then under way, which is an error of its own."""
    a, out = problem()
    error = run("cp_async", out, a, mode=1, reverse=reverse)
    assert "copied to, while an asynchronous copy to it was under way" in error
    assert out.isnan().any()


@BOTH_ORDERS
def test_cp_async_with_a_wait_for_too_few_reads_poison(reverse, run):
    a, out = problem()
    assert run("cp_async", out, a, mode=2, reverse=reverse) == ""
    assert out.isnan().any()


def test_cp_async_without_a_barrier_reads_poison(run):
    """A thread's wait is for its own copies only."""
    a, out = problem()
    run("cp_async", out, a, mode=3)
    assert out.isnan().any()


def test_cp_async_overtaking_a_reader_is_poison(run):
    a, out = problem()
    run("cp_async", out, a, mode=4)
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (5, "an address is not 16-byte aligned"),
        (6, "an address is not 16-byte aligned"),
        (7, "copy to what is not within one shared array"),
        (8, "copy to what is not within one shared array"),
        (9, "a thread ended before its cp.async had completed"),
        (10, r"was written, or copied to, while .* under way: thread \(9, 0, 0\)"),
    ],
    ids=["source", "target", "not_shared", "across_the_end", "unfinished", "written_meanwhile"],
)
@BOTH_ORDERS
def test_cp_async_faults(mode, message, reverse, run):
    a, out = problem()
    error = run("cp_async", out, a, mode=mode, reverse=reverse)
    assert re.search(message, error), error


def test_cp_async_fills_with_zeros_and_leaves_the_source_alone(run):
    a, out = problem()
    a[:, 20:24] = float("nan")  # thread 5's
    assert run("cp_async", out, a, mode=11) == ""
    want = a.clone()
    want[:, 20:24] = 0
    assert torch.equal(out, want)


def test_copies_past_the_end_of_a_tensor_are_errors(run, guarded):
    a, out = problem()
    assert run("bulk_copy", out, guarded(a)) == ""
    short = guarded(a[:-1].contiguous())
    for name in ("cp_async", "bulk_copy"):
        assert "illegal memory access by thread" in run(name, out, short)


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (2, r"more arrivals at an mbarrier than its count"),
        (3, r"deadlock: thread .* waits at .*for the phase of parity 0 of the mbarrier .*"
            r"0 phases completed, this one lacks 0 of 1 arrivals and 16 bytes"),
        (4, r"deadlock: .*0 phases completed, this one lacks 0 of 1 arrivals and -16 bytes"),
        (6, r"bulk copy before the mbarrier's mbarrier_init_fence"),
        (7, r"mbarrier used before its initialisation"),
        (8, r"mbarrier initialised twice"),
        (9, r"its size is no multiple of 16 bytes"),
        (10, r"an address is not 16-byte aligned"),
        (11, r"copy to what is not within one shared array"),
        (12, r"block .* ended before its bulk copy had completed"),
        (13, r"deadlock: .*arrivals|more arrivals at an mbarrier than its count"),
        (14, r"was written, or copied to, while an asynchronous copy to it was under way"),
        (15, r"deadlock: .*; thread \(64, 0, 0\) .* this one lacks 1 of 64 arrivals and 0 bytes"),
    ],
    ids=[
        "never_freed", "expects_too_much", "expects_too_little", "no_fence", "no_initialisation",
        "twice_initialised", "odd_size", "misaligned", "across_the_end", "never_waited",
        "too_many_arrivals", "written_meanwhile", "too_few_arrivals",
    ],
)  # fmt: skip
def test_bulk_copy_faults(mode, message, reverse, run):
    a, out = problem()
    error = run("bulk_copy", out, a, mode=mode, reverse=reverse)
    assert re.search(message, error), error


@BOTH_ORDERS
@pytest.mark.parametrize("mode", [1, 5], ids=["no_wait", "wrong_parity"])
def test_bulk_copy_without_its_wait_reads_poison(mode, reverse, run):
    a, out = problem()
    run("bulk_copy", out, a, mode=mode, reverse=reverse)
    assert out.isnan().any()


def test_bulk_copy_overtaking_a_reader_is_noticed_where_the_producer_is_first(run):
    """One of the two orders shows it: here the reverse, in which the last warp has the first turn."""
    a, out = problem()
    assert run("bulk_copy", out, a, mode=16) == ""
    assert torch.equal(out, a)
    run("bulk_copy", out, a, mode=16, reverse=True)
    assert out.isnan().any()


@BOTH_ORDERS
def test_clusters(reverse, run):
    a = torch.randn(6, THREADS)
    out = torch.zeros(6 * 3 * THREADS + 6)
    assert run("cluster", out, a, reverse=reverse) == ""
    rolled = a.roll(-1, 1).view(2, 1, 3, THREADS).expand(2, 3, 3, THREADS)
    assert torch.equal(out[:-6].view(2, 3, 3, THREADS), rolled)
    assert out[-6:].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_launch_without_clusters_has_clusters_of_one(run):
    a, out = torch.randn(6, THREADS), torch.zeros(6 * THREADS + 6)
    assert run("no_cluster", out, a) == ""
    assert torch.equal(out[:-6].view(6, THREADS), a.roll(-1, 1))
    assert not out[-6:].any()


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, "cluster: read from the shared memory of a block that has not begun"),
        (2, "cluster: read from the shared memory of a block that has ended"),
        (3, "cluster: no block of this rank"),
        (4, "cluster: the address is not in the block's shared memory"),
        (5, r"divergent barrier: thread .* of block \(0, 0, 0\) waits .*, "
            r"thread .* of block \(1, 0, 0\) has ended"),
    ],
    ids=["no_sync_before", "no_sync_after", "bad_rank", "not_shared", "stays_away"],
)  # fmt: skip
def test_cluster_faults(mode, message, reverse, run):
    a, out = torch.randn(6, THREADS), torch.zeros(6 * 3 * THREADS + 6)
    error = run("cluster", out, a, mode=mode, reverse=reverse)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("dynamic", "ctas", "cluster", "ask", "message"),
    [
        (44 * KB, 1, 1, False, ""),
        (45 * KB, 1, 1, False, "more shared memory than the kernel may have"),
        (223 * KB, 1, 1, True, ""),
        (224 * KB, 1, 1, True, "more shared memory than the kernel may have"),
        (228 * KB, 1, 1, True, "probe: invalid argument"),
        (49 * KB, 1, 1, False, "probe: invalid argument"),
        (60 * KB, 1, 1, False, "probe: invalid argument"),
        (KB, 16, 8, True, ""),
        (KB, 16, 16, True, "probe: invalid argument"),
        (KB, 15, 2, True, "probe: invalid argument"),
    ],
    ids=str,
)
def test_limits_of_a_launch(dynamic, ctas, cluster, ask, message, library):
    library.launch_shared.restype = ctypes.c_char_p
    error = library.launch_shared(dynamic, ctas, cluster, ask).decode()
    assert message in error
    assert bool(error) == bool(message)
