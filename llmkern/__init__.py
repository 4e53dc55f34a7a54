"""llmkern: smaller, faster language models on hand-written kernels."""

from pathlib import Path as _Path

from llmkern._backends import use_backend
from llmkern._version import __version__

# These functions, patch, prune and quantize stand before the submodules of their names.
from llmkern.distill import distill
from llmkern.evaluate import evaluate
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat
from llmkern.hf import accelerate, load, save
from llmkern.masks import keep_masks
from llmkern.nn import (
    Int4Linear,
    IntLinear,
    Lut4Linear,
    Sparse24Int4Linear,
    Sparse24Linear,
    prepare,
)
from llmkern.patch import patch
from llmkern.prune import prune
from llmkern.quantize import quantize

# In a source tree that was built in place and not installed, the Triton kernels lie beside the package.
_root = _Path(__file__).resolve().parent.parent
if (_root / "triton_kernels" / "__init__.py").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

__all__ = [
    "Int4Linear",
    "IntLinear",
    "Lut4Linear",
    "LutFormat",
    "QuantFormat",
    "Sparse24Int4Linear",
    "Sparse24Linear",
    "__version__",
    "accelerate",
    "distill",
    "evaluate",
    "keep_masks",
    "load",
    "patch",
    "prepare",
    "prune",
    "quantize",
    "save",
    "use_backend",
]
