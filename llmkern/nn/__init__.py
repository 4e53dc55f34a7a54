"""Drop-in modules on the compressed ops."""

from llmkern.nn._packed_weight import PackedWeight
from llmkern.nn.int4_linear import Int4Linear
from llmkern.nn.lut4_linear import Lut4Linear

__all__ = ["Int4Linear", "Lut4Linear", "PackedWeight"]
