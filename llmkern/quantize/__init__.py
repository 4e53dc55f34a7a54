"""Quantization methods, and the function that applies one to a whole model."""

from llmkern.drive.options import DataOptions
from llmkern.quantize._driver import METHODS, quantize
from llmkern.quantize._method import QuantizedModule, QuantizedWeight, QuantizeMethod
from llmkern.quantize._report import QuantizedLayer, QuantizeReport
from llmkern.quantize.gptq import GptqOptions, gptq
from llmkern.quantize.rtn import RtnOptions, rtn
from llmkern.quantize.tables import TableOptions

__all__ = [
    "METHODS",
    "DataOptions",
    "GptqOptions",
    "QuantizeMethod",
    "QuantizeReport",
    "QuantizedLayer",
    "QuantizedModule",
    "QuantizedWeight",
    "RtnOptions",
    "TableOptions",
    "gptq",
    "quantize",
    "rtn",
]
