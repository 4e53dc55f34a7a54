"""Weight formats, and packed layouts as pure functions."""

from llmkern.formats._format import Misfit, WeightFormat
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat

# The formats that a rule can give to a layer.
FORMATS: list[type[WeightFormat]] = [QuantFormat, LutFormat]

__all__ = ["FORMATS", "LutFormat", "Misfit", "QuantFormat", "WeightFormat"]
