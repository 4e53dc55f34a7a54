"""Memory for weights that kernels stream: on 2 MB pages where the system grants them.

Reading a weight once per token touches every 4 KB page of it, so the page walks cost bandwidth; on
2 MB pages they vanish.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def empty_huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU tensor whose memory asks for transparent huge pages.

    It is an ordinary tensor that owns its memory; copies of it (clone, deepcopy, pickle) are placed as
    torch places any tensor. Small tensors, and systems without transparent huge pages, get
    `torch.empty`.

    Args:
        shape: of the tensor.
        dtype: of the tensor.

    Returns:
        A contiguous tensor, aligned to 2 MB if it is at least that large.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    try:
        # Not for what is left at the end: a page is taken whole.
        region.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    except OSError:  # the kernel was built without them
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(region, dtype=dtype, offset=start, count=size // dtype.itemsize)
    return tensor.view(*shape)
