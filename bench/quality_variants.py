"""What bench/quality.py measures: suites of variants, each a call of llmkern's own drivers.

A variant is (driver, method, options). `llmkern.quantize` and `llmkern.prune` take them; calibration
data, tokenizer and seed are added by the bench where the variant calibrates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmkern.drive import find_method
from llmkern.prune import METHODS


@dataclass(frozen=True)
class Variant:
    """One way to compress the model.

    Attributes:
        name: in the table.
        driver: "quantize" or "prune".
        method: of the driver.
        options: for the driver, without those of the data.
        calibrated: takes calibration data, so that seeds matter.
    """

    name: str
    driver: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = True


def _quantize(bits: int) -> list[Variant]:
    """The plain methods, GPTQ's defaults, and the defaults with one thing changed."""
    plain = {"clip_search": False}
    gptq: dict[str, dict[str, Any]] = {
        "plain, natural order, static": plain | {"act_order": False},
        "plain, natural order, dynamic": plain | {"group_scales": "dynamic"},
        "plain, act_order": plain,
        "defaults": {},
        "natural order": {"act_order": False},
        "dynamic": {"group_scales": "dynamic"},
        "one pass": {"true_sequential": False},
        "asymmetric": {"symmetric": False},
        "damp 0.003": {"damp": 0.003},
        "damp 0.03": {"damp": 0.03},
        "damp 0.1": {"damp": 0.1},
        "per channel": {"group_size": None},
    }
    rtn: dict[str, dict[str, Any]] = {
        "rtn": plain,
        "rtn asymmetric": plain | {"symmetric": False},
        "rtn clip_search": {"clip_search": True},
    }
    width = {"bits": bits}
    return [
        *(
            Variant(f"{bits}-bit {name}", "quantize", "rtn", width | options, calibrated=False)
            for name, options in rtn.items()
        ),
        *(
            Variant(f"{bits}-bit gptq, {name}", "quantize", "gptq", width | options)
            for name, options in gptq.items()
        ),
    ]


def _calibrates(method: str) -> bool:
    kind = find_method(METHODS, method)
    return kind.work.needs(kind.options()).tokens


def _prune() -> list[Variant]:
    """Single weights: the three methods at 50 % and 2:4."""
    amounts: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
    return [
        Variant(f"{method} {label}", "prune", method, amount, calibrated=_calibrates(method))
        for label, amount in amounts.items()
        for method in ("magnitude", "wanda", "sparsegpt")
    ]


def _prune_options() -> list[Variant]:
    """What the options of pruning single weights do at 60 %."""
    half = {"sparsity": 0.6}
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "wanda": ("wanda", {}),
        "wanda, scope layer": ("wanda", {"scope": "layer"}),
        "wanda, true_sequential": ("wanda", {"true_sequential": True}),
        "wanda, owl": ("wanda", {"allocation": "owl"}),
        "sparsegpt": ("sparsegpt", {}),
        "sparsegpt, scope row": ("sparsegpt", {"scope": "row"}),
        "sparsegpt, one pass": ("sparsegpt", {"true_sequential": False}),
        "sparsegpt, act_order": ("sparsegpt", {"act_order": True}),
        "sparsegpt, damp 0.1": ("sparsegpt", {"damp": 0.1}),
        "sparsegpt, owl": ("sparsegpt", {"allocation": "owl"}),
    }
    return [
        Variant(f"60 % {name}", "prune", method, half | changes)
        for name, (method, changes) in options.items()
    ]


def _structured() -> list[Variant]:
    """Neurons at 10, 20 and 30 %, heads, and one block; with and without adjusting what is left."""
    variants = []
    for ratio in (0.1, 0.2, 0.3):
        for importance in ("obs", "activation", "magnitude"):
            for compensate in (True, False):
                variants.append(
                    Variant(
                        f"glu {ratio:.0%} {importance}, {_HOW[compensate]}",
                        "prune",
                        "glu",
                        {"ratio": ratio, "importance": importance, "compensate": compensate},
                        calibrated=compensate or importance != "magnitude",
                    )
                )
    for compensate in (True, False):
        options = {"ratio": 0.5, "compensate": compensate}
        variants.append(Variant(f"heads 50% obs, {_HOW[compensate]}", "prune", "heads", options))
        options = {"ratio": 0.2, "compensate": compensate, "parts": "mlp"}
        variants.append(Variant(f"taylor 20%, {_HOW[compensate]}", "prune", "taylor", options))
    uneven = {"ratio": 0.2, "allow_uneven": True}
    variants.append(Variant("glu 20% obs, uneven", "prune", "glu", uneven))
    for criterion in ("cosine", "perplexity"):
        options = {"blocks": 1, "criterion": criterion}
        variants.append(Variant(f"depth, 1 block of 4, {criterion}", "prune", "depth", options))
    return variants


_HOW = {True: "compensated", False: "not compensated"}

SUITES: dict[str, list[Variant]] = {
    "prune": _prune(),
    "prune-options": _prune_options(),
    "structured": _structured(),
    "quantize": [*_quantize(4), *_quantize(3)],
}

# What is measured where no suite is named.
DEFAULT = ["prune", "structured"]
