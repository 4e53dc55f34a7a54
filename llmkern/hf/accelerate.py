"""Take over a model that transformers has loaded: compressed-tensors, bitsandbytes, 2:4 sparse."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from llmkern.hf._foreign import release
from llmkern.hf._sparse24 import accelerate_sparse
from llmkern.models import left_share
from llmkern.nn import is_packed, prepare
from llmkern.patch import warn_dense
from llmkern.wire import WIRES

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Run a compressed-tensors, bitsandbytes 4-bit or 2:4 sparse model on llmkern's kernels.

    transformers keeps a `pack-quantized` checkpoint packed only until the first forward pass, which
    expands every layer to dense. Called before that pass, this swaps the packed layers for
    `IntLinear`, sharing their tensors: nothing is expanded, and saving writes the same bytes.

        model = AutoModelForCausalLM.from_pretrained("some/w4a16-checkpoint")
        model = llmkern.accelerate(model)

    A model that transformers has loaded with bitsandbytes in 4 bits gets `Lut4Linear` layers instead, at
    any time; nested scales are decoded.

    Linears whose weight is 2:4 sparse (at most two non-zeros in every 4 columns, 45 % zeros in all)
    become `Sparse24Linear`, and such `IntLinear`, their zeros being the codes at the zero point,
    `Sparse24Int4Linear`, at any time and in any of these models; layers that share their weight stay
    dense. Saving writes the plain dense or int4 model again.

    Layers of other formats (8 bits, fp8, quantized activations ...) and MoE experts held as 3-D
    parameters stay with transformers and are listed in one warning.

    Args:
        model: from `from_pretrained`, with compressed-tensors installed and not used yet, or with
            bitsandbytes; or any model with 2:4 sparse weights, whoever loaded it.

    Returns:
        The same model, changed in place.

    Raises:
        ValueError: the first forward pass has already expanded the model, or nothing in it is packed or
            2:4 sparse.
    """
    found = (wire.take_over(model) for wire in WIRES)
    taken = next((result for result in found if result is not None), None)
    if taken is not None:
        if taken.complete:
            release(model)
        warn_dense("accelerate", taken.left, left_share(model, ()))
    ours = any(is_packed(module) for module in model.modules())
    if not accelerate_sparse(model) and taken is None and not ours:
        kinds = ", ".join(wire.takes for wire in WIRES if wire.takes is not None)
        raise ValueError(
            f"model: got no packed layer in it, expected {kinds}, or 2:4 sparse weights"
        )
    return prepare(model)
