"""What `llmkern compare` shows of pruning: every method at an amount at which it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Label -> options of `llmkern.prune`, its method among them.
COMPARED: dict[str, Mapping[str, Any]] = {
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "sparsegpt 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "wanda 50 %": {"method": "wanda", "sparsity": 0.5},
    "magnitude 2:4": {"method": "magnitude", "pattern": "2:4"},
    "magnitude 50 %": {"method": "magnitude", "sparsity": 0.5},
    "glu 20 %": {"method": "glu", "ratio": 0.2},
    "mlp 20 %": {"method": "mlp", "ratio": 0.2},
    "heads 50 %": {"method": "heads", "ratio": 0.5},
    "taylor 20 %": {"method": "taylor", "ratio": 0.2},
    "depth 25 %": {"method": "depth", "ratio": 0.25},
}
