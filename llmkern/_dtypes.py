"""The dtypes that weights, activations and scales may have, and what files and kernels call them."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without the "torch." in front, as configurations and messages have it."""
    return str(dtype).removeprefix("torch.")


# As the compiled kernels take them: DType of csrc/llmkern.h.
FLOAT_NAMES = {dtype: dtype_name(dtype) for dtype in FLOATS}
FLOATS_BY_NAME = {name: dtype for dtype, name in FLOAT_NAMES.items()}
SAFETENSORS_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def overflow_hint(dtype: torch.dtype) -> str:
    """What to add to a message about NaN or Inf in numbers of this dtype; nothing for wide ones."""
    if dtype != torch.float16:
        return ""
    return " (float16 ends at 65504: dtype bfloat16 has float32's range)"
