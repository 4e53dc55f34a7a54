"""Drop-in modules on the compressed ops."""

from llmkern.nn._packed_linear import PackedLinear, is_packed
from llmkern.nn._packed_weight import PackedWeight
from llmkern.nn._prepare import prepare
from llmkern.nn.int_linear import Int4Linear, IntLinear
from llmkern.nn.lut4_linear import Lut4Linear
from llmkern.nn.packed import PACKED, packed_class
from llmkern.nn.sparse24_int4_linear import Sparse24Int4Linear
from llmkern.nn.sparse24_linear import Sparse24Linear

__all__ = [
    "PACKED",
    "Int4Linear",
    "IntLinear",
    "Lut4Linear",
    "PackedLinear",
    "PackedWeight",
    "Sparse24Int4Linear",
    "Sparse24Linear",
    "is_packed",
    "packed_class",
    "prepare",
]
