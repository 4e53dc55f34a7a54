"""Drop-in modules on the compressed ops."""

from llmkern.nn._packed_weight import PackedWeight
from llmkern.nn.int4_linear import Int4Linear

__all__ = ["Int4Linear", "PackedWeight"]
