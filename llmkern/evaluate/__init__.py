"""Quality, size and speed of a model; benchmarks of `lm_eval` in `llmkern.evaluate.lm_eval`."""

from llmkern.evaluate.quality import Evaluation, evaluate, next_token_logits, score_logits
from llmkern.evaluate.speed import speeds, weight_bytes

__all__ = [
    "Evaluation",
    "evaluate",
    "next_token_logits",
    "score_logits",
    "speeds",
    "weight_bytes",
]
