"""What `llmkern compare` shows of quantizing: every method, the integer ones at 4 and 3 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Label -> options of `llmkern.quantize`, its method among them.
COMPARED: dict[str, Mapping[str, Any]] = {
    "rtn 4-bit": {"method": "rtn", "bits": 4},
    "rtn 3-bit": {"method": "rtn", "bits": 3},
    "gptq 4-bit": {"method": "gptq", "bits": 4},
    "gptq 3-bit": {"method": "gptq", "bits": 3},
    "nf4": {"method": "nf4"},
    "fp4": {"method": "fp4"},
}
