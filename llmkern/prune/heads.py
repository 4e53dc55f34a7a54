"""Structured pruning of attention: key/value heads with all query heads that read them.

With grouped queries, a query head cannot go alone without breaking the even sharing of keys and values
that configs describe; so whole groups go, with their rows of q, k and v and their columns of o. The size
of a head stays, so that the config's `head_dim` no longer follows from the hidden size; a model whose
config cannot say so (OPT, GPT-2, GPT-NeoX) is refused.
"""

from __future__ import annotations

from llmkern.prune._method import PruneMethod
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import UnitWork

METHOD = PruneMethod(
    name="heads",
    about="key/value heads, with all query heads that read them",
    options=WidthOptions,
    amounts=("ratio",),
    work=UnitWork(lambda options: ("attention",)),
    needs_amount=False,
    compared={"heads 50 %": {"ratio": 0.5}},
)
