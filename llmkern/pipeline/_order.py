"""Why an order of stages costs quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkern.pipeline.stages import Stage

# (earlier, later) -> what is lost by it.
_REASONS = {
    ("quantize", "prune"): (
        "pruning needs dense weights, so the packed layers are expanded and what quantizing saved is "
        "gone; its codes were fitted to weights that pruning then removes, and their rounding errors "
        "stay: prune first"
    ),
    ("quantize", "quantize"): (
        "the second rounds what the first has rounded already, and both errors stay: quantize once"
    ),
    ("distill", "prune"): (
        "part of what distillation has taught the student is pruned away again, with no training after "
        "it: prune first, the student then learns to make up for it"
    ),
    ("distill", "quantize"): (
        "the student is rounded after its training, with none after it to make up for the errors: "
        "quantize the teacher first, or distill again afterwards"
    ),
}
_MIXED = (
    "the student {student!r} trains dense weights: what quantizing saved is gone, and only its rounding "
    "errors stay"
)


def order_warnings(stages: Sequence[Stage[Any]]) -> list[str]:
    """One sentence for each pair of stages whose order costs quality.

    The order that costs none is prune, quantize, distill: each step works with what the ones before it
    left, and the last trains a model against the errors of all.
    """
    found = []
    for second, later in enumerate(stages):
        for first, earlier in enumerate(stages[:second]):
            pair = f"stages {first + 1} and {second + 1}: {earlier.name} before {later.name}: "
            reason = _REASONS.get((earlier.name, later.name))
            if reason is None or any(
                stage.name == "distill" for stage in stages[first + 1 : second]
            ):
                # A student made in between carries nothing of it on.
                continue
            packs = (earlier.name, later.name) == ("distill", "quantize")
            if packs and any(stage.name == "quantize" for stage in stages[:first]):
                # The order is kept; the student of a packed teacher is packed, too.
                continue
            found.append(pair + reason)
    for index, stage in enumerate(stages):
        student = getattr(stage, "student", None)
        if student == "current" and any(s.name == "quantize" for s in stages[:index]):
            found.append(f"stage {index + 1}: {_MIXED.format(student=student)}")
    return found
