"""What `llmkern compare` shows of distilling: every method, into half of the model's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HALF = {"student": {"layers": 0.5}}

# Label -> options of the pipeline's stage, its method among them; prompts, where they stand here, are
# filled in: beginnings of calibration windows.
COMPARED: dict[str, Mapping[str, Any]] = {
    "distill soft": {"method": "soft", **_HALF},
    "distill hidden": {"method": "hidden", **_HALF},
    "distill gkd": {"method": "gkd", **_HALF},
    "distill minillm": {"method": "minillm", **_HALF},
    "distill sequence": {"method": "sequence", "prompts": None, **_HALF},
    "distill in context": {
        "method": "in_context",
        "prompts": None,
        "template": "The following text is clear, complete and correct.\n\n{prompt}",
        "alpha": 0.5,
        **_HALF,
    },
}
