"""Device functions that decode 4-bit codes by a book of 16 float32 entries.

codes lie as in int4.py. The book is looked up through pointers: its 64 bytes stay in the L1 cache. A
book may belong to the whole weight, to a row or to a group.
"""

import triton
import triton.language as tl

from .int4 import interleave
from .numerics import INTERPRETED, narrow


@triton.jit
def load_tensor_book(book_ptr, rows, groups, num_groups, mask):
    """Pointers to the first entry of each group's book, [16]."""
    return book_ptr + tl.zeros(mask.shape, tl.int32)


@triton.jit
def load_row_book(book_ptr, rows, groups, num_groups, mask):
    """Pointers to the first entry of each group's book, [N, 16]."""
    return book_ptr + tl.where(mask, rows * 16, 0)


@triton.jit
def load_group_book(book_ptr, rows, groups, num_groups, mask):
    """Pointers to the first entry of each group's book, [N, K / GROUP_SIZE, 16]."""
    return book_ptr + tl.where(mask, (rows * num_groups + groups) * 16, 0)


@triton.jit
def book_plane(words, books, I: tl.constexpr):  # noqa: E741 (code index, a constant)
    """Entries, float32, for plane I of int32 `words`."""
    entries = books + ((words >> (4 * I)) & 0xF)
    if INTERPRETED:
        return tl.load(entries)
    else:
        # Triton would move entries that it loads itself through shared memory, ahead of their use.
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [entries], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def book_tile(words, books, DTYPE: tl.constexpr):
    """Entries, rounded to DTYPE: words [N, W] to [N, 8 W]."""
    return interleave(
        narrow(book_plane(words, books, 0), DTYPE),
        narrow(book_plane(words, books, 1), DTYPE),
        narrow(book_plane(words, books, 2), DTYPE),
        narrow(book_plane(words, books, 3), DTYPE),
        narrow(book_plane(words, books, 4), DTYPE),
        narrow(book_plane(words, books, 5), DTYPE),
        narrow(book_plane(words, books, 6), DTYPE),
        narrow(book_plane(words, books, 7), DTYPE),
    )
