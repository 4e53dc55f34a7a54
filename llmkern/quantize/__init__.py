"""Quantization methods, and the function that applies one to a whole model."""

from llmkern._drive import DataOptions
from llmkern.quantize._compared import COMPARED
from llmkern.quantize._driver import METHODS, quantize
from llmkern.quantize._report import LayerReport, QuantizedWeight, QuantizeReport
from llmkern.quantize.gptq import GptqOptions, gptq
from llmkern.quantize.rtn import RtnOptions, rtn
from llmkern.quantize.tables import TableOptions

__all__ = [
    "COMPARED",
    "METHODS",
    "DataOptions",
    "GptqOptions",
    "LayerReport",
    "QuantizeReport",
    "QuantizedWeight",
    "RtnOptions",
    "TableOptions",
    "gptq",
    "quantize",
    "rtn",
]
