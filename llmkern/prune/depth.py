"""Depth pruning: whole decoder blocks go.

    cosine       blocks whose output is most like their input: 1 - mean cos(x_in, x_out) over tokens, the
                 Block Influence of ShortGPT (Men et al. 2024, arXiv 2403.03853)
    perplexity   blocks without which the perplexity of the calibration text rises the least

Either once, by the scores in the whole model, or one block after the other, each time with the scores
of what is left. A run that resumes scores again; only a recovery goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llmkern._dtypes import overflow_hint
from llmkern.calibrate import Block, skipped, walk
from llmkern.drive import Findings, Needs, Progress, Shapes, Tokens, fresh
from llmkern.evaluate import evaluate
from llmkern.masks import rename_recorded
from llmkern.models import check_depth, find_blocks, keep_blocks
from llmkern.prune._method import PruneJob, PruneMethod, PruneWork
from llmkern.prune._options import SizeOptions, one_of
from llmkern.prune.recovery import recover_job, recovery_journal, recovery_nbytes

CRITERIA = ("cosine", "perplexity")


@dataclass(frozen=True)
class DepthOptions(SizeOptions):
    """Options of `depth`.

    Attributes:
        blocks: how many blocks to remove, in place of ratio and target_params.
        criterion: score of a block: "cosine" or "perplexity".
        iterative: score what is left anew after each removal.
        keep_first, keep_last: blocks at either end that stay.
    """

    blocks: int | None = None
    criterion: str = "cosine"
    iterative: bool = False
    keep_first: int = 1
    keep_last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks: got {self.blocks}, expected at least 1")
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion: got {self.criterion!r}, expected one of {', '.join(CRITERIA)}"
            )
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")


def count_removed(job: PruneJob, candidates: list[int]) -> int:
    """How many of the candidates go."""
    model, options = job.model, job.options
    modules = find_blocks(model).modules
    limit = min(len(candidates), len(modules) - 1)
    ends = f"{options.keep_first} first and {options.keep_last} last of {len(modules)} blocks kept"
    if options.target_params is not None:
        present = sum(p.numel() for p in model.parameters())
        # Whichever go: the smallest candidates decide, so that the target is met in any case.
        sizes = sorted(sum(p.numel() for p in modules[i].parameters()) for i in candidates)
        for count in range(limit + 1):
            if present - sum(sizes[:count]) <= options.target_params:
                return count
        raise ValueError(
            f"target_params: got {options.target_params}, expected at least "
            f"{present - sum(sizes[:limit])} with the {ends}"
        )
    count = options.blocks
    if count is None:
        assert isinstance(job.amount, float)
        count = round(job.amount * len(modules))
        if count == 0 and job.amount > 0:
            raise ValueError(
                f"ratio: got {job.amount}, which is less than half of one of {len(modules)} blocks"
            )
    if count > limit:
        asked = f"ratio: got {job.amount}" if job.amount is not None else f"blocks: got {count}"
        raise ValueError(f"{asked}, expected at most {limit} blocks with the {ends}")
    return count


def _scores(job: PruneJob, candidates: list[int], removed: list[int]) -> dict[int, float]:
    """What each candidate that is still there contributes, by its index."""
    modules = find_blocks(job.model).modules
    left = [index for index in candidates if index not in removed]
    if job.options.criterion == "cosine":
        influence = _influence(job, removed)
        return {index: influence[index] for index in left}
    scores = {}
    for index in left:
        with _skipping(modules, [*removed, index]):
            result = evaluate(
                job.model,
                job.windows(),
                batch_size=job.data.batch_size,
                speed=False,
                compute_dtype=job.data.compute_dtype,
            )
        scores[index] = result.perplexity
    return scores


@contextmanager
def _skipping(modules: nn.ModuleList, gone: list[int]) -> Iterator[None]:
    with ExitStack() as stack:
        for index in gone:
            stack.enter_context(skipped(modules[index]))
        yield


def _influence(job: PruneJob, removed: list[int]) -> dict[int, float]:
    """1 - mean cosine of input and output of every block, those before it less the removed ones."""
    influence: dict[int, float] = {}

    def measure(block: Block) -> None:
        if block.index in removed:
            return
        total, tokens = 0.0, 0
        for batch in range(block.states.batches()):
            before = block.states.entering(batch).float()
            after = block.run(batch).float()
            cosine = F.cosine_similarity(before, after, dim=-1)
            if bool(cosine.isnan().any()):  # squares of finite numbers may pass float32's range
                cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
            total += float(cosine.sum(dtype=torch.float64))
            tokens += cosine.numel()
        influence[block.index] = 1 - total / tokens
        if math.isnan(influence[block.index]):
            raise ValueError(
                f"{block.name}: its outputs on the calibration data hold NaN or Inf"
                f"{overflow_hint(block.states.entering(0).dtype)}"
            )

    modules = find_blocks(job.model).modules
    with _skipping(modules, removed):
        walk(
            job.model,
            job.windows(),
            measure,
            batch_size=job.data.batch_size,
            compute=job.data.compute_dtype,
        )
    return influence


def _runs_of(candidates: list[int], count: int) -> list[list[int]]:
    """Every `count` neighbours among the candidates."""
    return [candidates[i : i + count] for i in range(len(candidates) - count + 1)]


def _without(model: nn.Module, gone: list[int]) -> list[int]:
    return [index for index in range(len(find_blocks(model))) if index not in gone]


def _first_feasible(model: nn.Module, candidates: list[int], count: int) -> list[int]:
    """The last `count` neighbours among the candidates that the model's class can do without.

    Raises:
        ValueError: there are none; says why the first that were tried cannot go.
    """
    reason: ValueError | None = None
    for gone in reversed(_runs_of(candidates, count)):
        try:
            check_depth(model, _without(model, gone))
        except ValueError as error:
            reason = reason or error
        else:
            return gone
    assert reason is not None
    raise reason


def _feasible(
    model: nn.Module, candidates: list[int], wanted: list[int], scores: dict[int, float]
) -> tuple[list[int], list[str]]:
    """The blocks to remove: those wanted, or the neighbours of least score that the class can lose."""
    try:
        check_depth(model, _without(model, wanted))
        return wanted, []
    except ValueError as error:
        reason = error
    runs = _runs_of(candidates, len(wanted))
    if any(index not in scores for run in runs for index in run):
        raise reason  # scored one after the other: no sum of scores says anything
    for run in sorted(runs, key=lambda run: sum(scores[index] for index in run)):
        try:
            check_depth(model, _without(model, run))
        except ValueError:
            continue
        note = f"neighbouring blocks {run} go in place of {sorted(wanted)}, which the class cannot lose"
        return run, [note]
    raise reason


class _Work(PruneWork):
    """Whole blocks go."""

    def needs(self, settings: DepthOptions) -> Needs:
        """Tokens to score the blocks on."""
        return Needs(tokens=True)

    def nbytes(self, settings: DepthOptions, shapes: Shapes, tokens: Tokens) -> int:
        """Logits, where perplexities are compared."""
        return tokens.logits(shapes) if settings.criterion == "perplexity" else 0

    def nbytes_after(self, settings: Any, after: Shapes, batch: int, tokens: Tokens) -> int:
        """Of the recovery."""
        return recovery_nbytes(settings, after, batch, tokens)

    def nbytes_journal(self, settings: Any, after: Shapes, tokens: Tokens) -> int:
        """The state of the recovery: of the scores there is nothing to keep."""
        return recovery_journal(settings, after)

    def after(self, job: PruneJob, shapes: Shapes, found: Findings) -> Shapes:
        """As many blocks as will be left; any do for shapes, where the blocks are alike."""
        total = len(find_blocks(shapes.model))
        last = total - job.options.keep_last
        candidates = list(range(job.options.keep_first, last))
        count = count_removed(job, candidates)
        gone = _first_feasible(shapes.model, candidates, count)
        made = fresh(shapes.model)
        keep_blocks(made, _without(made, gone))
        return dataclasses.replace(shapes, model=made, widths={})

    def run(self, job: PruneJob) -> None:
        """Remove the decoder blocks that matter least.

        Raises:
            ValueError: more blocks than may go, a target that cannot be met, a model class that cannot
                be built without the blocks that were chosen; the model is then as it was.
        """
        model, options = job.model, job.options
        one_of(ratio=job.amount, target_params=options.target_params, blocks=options.blocks)
        if job.rules:
            raise ValueError(f"rules: got {dict(job.rules)}, expected none: whole blocks go")
        total = len(find_blocks(model))
        candidates = list(range(options.keep_first, total - options.keep_last))
        count = count_removed(job, candidates)
        _first_feasible(model, candidates, count)  # before anything is scored
        # Which blocks go is only known when all is scored: there is nothing to go on from before that.
        job.open_journal(calibrated=True)
        removed: list[int] = []
        scores: dict[int, float] = {}
        rounds = (count if options.iterative else 1) if count else 0
        with Progress("prune", "scored", rounds, shown=job.progress) as bar:
            for _ in range(rounds):
                bar.say("score the blocks")
                scores = _scores(job, candidates, removed)
                chosen = sorted(scores, key=lambda index: scores[index])[: count // rounds]
                removed += chosen
                bar.finish(", ".join(map(str, chosen)))
        if removed:
            removed, note = _feasible(model, candidates, removed, scores)
            job.report.notes += note
            kept = [index for index in range(total) if index not in removed]
            keep_blocks(model, kept)
            prefix = find_blocks(model).name
            new: dict[str, str | None] = {f"{prefix}.{index}": None for index in removed} | {
                f"{prefix}.{old}": f"{prefix}.{index}" for index, old in enumerate(kept)
            }
            rename_recorded(model, new)
        job.report.removed_blocks = sorted(removed)
        job.report.notes.append(f"{total - count} of {total} decoder blocks stay")
        recover_job(job)


METHOD = PruneMethod(
    name="depth",
    about="whole decoder blocks",
    options=DepthOptions,
    amounts=("ratio",),
    work=_Work(),
    needs_amount=False,
    compared={"depth 25 %": {"ratio": 0.25}},
)
