"""4-bit weights of SqueezeLLM (arXiv 2306.07629) to the canonical layout of `llmkern.formats.lut4`.

What a checkpoint holds of one linear layer:

    qweight       int32 [K / 8, N]     code k of column n in nibble k % 8 of word k // 8
    lookup_table  float [N, 16]        one book per row of w; no scales
    rows, cols, vals                   outliers as a sparse matrix, added to the above
    full_rows, full_row_indices        some whole input rows, likewise

For tensors that a caller has read: SqueezeLLM's files are pickles, so `llmkern.load` does not open them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmkern.formats.lut4 import Lut4Weight

_SPARSE = ("rows", "cols", "vals", "full_rows", "full_row_indices")


def from_squeezellm(tensors: Mapping[str, Tensor]) -> Lut4Weight:
    """Read one layer's tensors.

    Args:
        tensors: by the names of the module docstring.

    Returns:
        The weight: a book per row, no scales, groups of 32.

    Raises:
        ValueError: a tensor is missing or does not fit; the layer has a sparse part, which
            `lut4_gemm` does not add.
    """
    sparse = [name for name in _SPARSE if name in tensors and tensors[name].numel()]
    if sparse:
        raise ValueError(
            f"{', '.join(sparse)}: got outliers of SqueezeLLM's dense-and-sparse form, expected a "
            "dense-only layer: there is no sparse product to add them with"
        )
    for name in ("qweight", "lookup_table"):
        if name not in tensors:
            raise ValueError(f"{name}: got none, expected SqueezeLLM's tensor of this name")
    qweight, book = tensors["qweight"], tensors["lookup_table"]
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.shape[0] % 4:
        raise ValueError(
            f"qweight: got {qweight.dtype} {list(qweight.shape)}, expected int32 [K/8, N], K a "
            "multiple of 32"
        )
    if not book.is_floating_point() or book.shape != (qweight.shape[1], 16):
        raise ValueError(
            f"lookup_table: got {book.dtype} {list(book.shape)}, expected float "
            f"[{qweight.shape[1]}, 16] (4 bits)"
        )
    return Lut4Weight(
        qweight.t().contiguous(), book.float().contiguous(), None, 32, None, book.dtype
    )
