"""Structured pruning of attention: key/value heads with all query heads that read them.

With grouped queries, a query head cannot go alone without breaking the even sharing of keys and values
that configs describe; so whole groups go, with their rows of q, k and v and their columns of o.
"""

from __future__ import annotations

from llmkern.prune._job import Job, Method
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import prune_units


def heads(job: Job) -> None:
    """Remove key/value heads, their query heads and what reads them from every block.

    The size of a head stays, so that the config's `head_dim` no longer follows from the hidden size.

    Raises:
        ValueError: a model whose config cannot say so (OPT, GPT-2, GPT-NeoX), or that accepts no
            suitable number of heads; what `prune_units` raises.
    """
    prune_units(job, ("attention",))


METHOD = Method(WidthOptions, ("ratio",), heads, needs_amount=False)
