"""What the stages of a pipeline make of a model's shapes, found on a model without data.

Each stage is planned by its driver's own functions on a skeleton of the model (on the meta device), so
that what a driver will refuse is refused here, in its words. What only data can decide (which blocks go,
which width each block gets) is taken at what the recipe says on average.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkern._drive import DataOptions, sort_options
from llmkern.distill import METHODS as DISTILL_METHODS
from llmkern.distill._plan import Job as DistillJob
from llmkern.distill._student import _chosen
from llmkern.evaluate import weight_bytes
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat
from llmkern.models import block_linears, changed_config, find_blocks, keep_blocks, skeleton
from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import tied_embedding
from llmkern.models.linears import shape_of
from llmkern.models.resize import resize_blocks
from llmkern.nn import PackedLinear
from llmkern.pipeline._stage import Stage
from llmkern.pipeline.stages import CURRENT, ORIGINAL, Distill, Prune, Quantize
from llmkern.prune import METHODS as PRUNE_METHODS
from llmkern.prune import DepthOptions, PruneReport, TaylorOptions, WidthOptions
from llmkern.prune._driver import sort_amount
from llmkern.prune._job import Job
from llmkern.prune._layers import plan_pruning
from llmkern.prune._structured import find_layers, plan_widths
from llmkern.prune.depth import count_removed
from llmkern.prune.taylor import PARTS
from llmkern.quantize import METHODS as QUANTIZE_METHODS
from llmkern.quantize._driver import check_groups, choose_format, plan_formats
from llmkern.train import TrainOptions
from llmkern.wire.checkpoint_files import CheckpointFiles, read_checkpoint

_KINDS = {"glu": ("glu",), "mlp": ("mlp", "glu"), "heads": ("attention",)}
# What each driver's methods are, for `sort_options`.
_METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "prune": ({name: kind.options for name, kind in PRUNE_METHODS.items()}, DataOptions),
    "quantize": (dict(QUANTIZE_METHODS), DataOptions),
    "distill": (dict(DISTILL_METHODS), TrainOptions),
}


@dataclass
class Shapes:
    """A model as a stage will find it.

    Attributes:
        model: dense, on the meta device, in the dtype that it will have.
        formats: of the layers that are packed, by full name.
        widths: K of layers of which only data will decide how many columns stay: those it may be, by
            full name.
        stored: bytes of its weights as they are, where it is there already; None: as the shapes say.
        packed: layers are packed in what is there.
        name: for messages.
    """

    model: nn.Module
    formats: dict[str, QuantFormat | LutFormat] = field(default_factory=dict)
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: int | None = None
    packed: bool = False
    name: str = "model"

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype


@dataclass
class Findings:
    """What was found: impossible, doubtful, and good to know."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """What is refused inside becomes an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `left_alone` says the same of all layers
            try:
                yield
            except (ValueError, NotImplementedError) as error:
                self.errors.append(str(error))

    def left_alone(self, model: nn.Module, left: dict[str, str]) -> None:
        """One line per reason why modules stay as they are, with what they hold of the weights."""
        total = sum(p.numel() for p in model.parameters())
        experts = find_expert_matrices(model)
        by_reason: dict[str, list[str]] = {}
        for name, reason in left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            modules = [model.get_submodule(name) for name in names]
            held = sum(p.numel() for module in modules for p in module.parameters())
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            line = f"{names[0]}{more} ({held / total:.1%} of the weights) left as it is: {reason}"
            # The rules ask for these, and they cannot be had.
            odd = names[0] in experts or "not a plain" in reason
            (self.warnings if odd else self.notes).append(line)


def read_shapes(model: Any, dtype: torch.dtype | None = None) -> Shapes:
    """The shapes of a model in memory, of its config, or of one in a directory; nothing is loaded.

    Args:
        model: a transformers model, its config, or a directory.
        dtype: that a directory or config will be loaded in; None is the checkpoint's own.

    Raises:
        ValueError: none of these, or a model class that transformers lacks.
        NotImplementedError: an encoder-decoder model.
    """
    from transformers import PretrainedConfig

    if isinstance(model, nn.Module):
        if getattr(model, "config", None) is None:
            raise ValueError(
                f"model: got {type(model).__name__}, expected a transformers model: it has no config"
            )
        find_blocks(model)
        made = skeleton(model, changed_config(model.config, {}))
        packed = any(isinstance(module, PackedLinear) for module in model.modules())
        made = made.to(next(model.parameters()).dtype)
        return Shapes(made, stored=weight_bytes(model), packed=packed, name=type(model).__name__)
    if isinstance(model, PretrainedConfig):
        return Shapes(_built(model, None, dtype), name=type(model).__name__)
    files = read_checkpoint(model)
    return _of_directory(files, dtype)


def _of_directory(files: CheckpointFiles, dtype: torch.dtype | None) -> Shapes:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
    name = (files.config.get("architectures") or [None])[0]
    packed = bool(files.config.get("quantization_config"))
    stored = sum(p.stat().st_size for p in Path(files.directory).glob("*.safetensors"))
    made = _built(config, name, dtype)
    return Shapes(made, stored=stored, packed=packed, name=str(files.directory))


def _built(config: Any, name: str | None, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: got the encoder-decoder {name or type(config).__name__}, expected a causal "
            "language model"
        )
    plain = changed_config(config, {})
    own = getattr(transformers, name or "", None)
    if name is not None and own is None:
        raise ValueError(f"model: got {name!r}, a class that transformers lacks")
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        made = auto.from_config(plain) if own is None else own(plain)
        resize_blocks(made, type(made), plain)
    find_blocks(made)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(kind, str):  # as the file has it
        kind = getattr(torch, kind)
    return made.eval().to(kind)  # type: ignore[no-any-return]


def after_stage(stage: Stage, before: Shapes, original: Shapes, found: Findings) -> Shapes:
    """The shapes that a stage leaves; what its driver will refuse goes to `found`.

    Args:
        stage: of the pipeline.
        before: the model that it gets.
        original: the model that the pipeline began with.
        found: filled.
    """
    after = before
    if (before.packed or before.formats) and not (
        isinstance(stage, Distill) and stage.student != CURRENT
    ):
        found.notes.append("its packed layers are expanded to dense ones first")
    with found.refusals():
        if isinstance(stage, Prune):
            after = _pruned(stage, before, found)
        elif isinstance(stage, Quantize):
            after = _quantized(stage, before, found)
        elif isinstance(stage, Distill):
            after = _student(stage, before, original, found)
    return after


def settings_of(stage: Stage) -> tuple[Any, Any]:
    """The options of a stage's method and those that all methods of its driver share, as dataclasses."""
    methods, common = _METHODS[stage.name]
    known = {f.name for kind in (methods[stage.method], common) for f in dataclasses.fields(kind)}
    own = {k: v for k, v in stage.options.items() if k in known}
    if common is TrainOptions and own.get("checkpoint_every"):
        own["checkpoint"] = "."  # the pipeline gives one
    return sort_options(stage.method, methods, own, common)


def _dense(shapes: Shapes) -> Shapes:
    """The same with packed layers expanded: the pipeline does so before it prunes or quantizes."""
    return Shapes(shapes.model, widths=dict(shapes.widths), name=shapes.name)


def _fresh(model: nn.Module) -> nn.Module:
    return skeleton(model, changed_config(model.config, {})).to(next(model.parameters()).dtype)


def _prune_job(stage: Prune, model: nn.Module) -> Job:
    settings, data = settings_of(stage)
    kind = PRUNE_METHODS[stage.method]
    amount, described = sort_amount(
        stage.method, kind, {name: stage.options.get(name) for name in kind.amounts}
    )
    report = PruneReport(stage.method, described, dataclasses.asdict(settings))
    rules = dict(stage.options.get("rules") or {})
    return Job(model, settings, data, amount, rules, report, dry=True)


def _pruned(stage: Prune, before: Shapes, found: Findings) -> Shapes:
    after = _dense(before)
    job = _prune_job(stage, after.model)
    if isinstance(job.options, DepthOptions):
        return _shallower(job, after)
    if isinstance(job.options, WidthOptions):
        kinds = (
            PARTS[job.options.parts]
            if isinstance(job.options, TaylorOptions)
            else _KINDS[stage.method]
        )
        return _narrower(job, kinds, after, found)
    plan_pruning(job)
    found.left_alone(after.model, job.report.kept)
    return after


def _shallower(job: Job, after: Shapes) -> Shapes:
    total = len(find_blocks(after.model))
    last = total - job.options.keep_last
    count = count_removed(job, list(range(job.options.keep_first, last)))
    made = _fresh(after.model)
    # Which ones only data can tell: any do for shapes, where the blocks are alike.
    keep_blocks(made, [i for i in range(total) if not last - count <= i < last])
    return dataclasses.replace(after, model=made, widths={})


def _narrower(job: Job, kinds: tuple[str, ...], after: Shapes, found: Findings) -> Shapes:
    model, options = after.model, job.options
    try:
        layers = find_layers(model, kinds, options.round_to, values=False)
    except (RuntimeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        found.warnings.append(
            f"{type(model).__name__}: its widths cannot be planned before it is loaded ({reason})"
        )
        return after
    even = dataclasses.replace(job, options=_evenly(options))
    plan = plan_widths(even, layers)
    if options.allow_uneven:
        found.notes.append("the blocks get widths of their own: only llmkern.load reads the result")
    else:
        found.notes += plan.notes
    made = skeleton(model, changed_config(model.config, plan.overrides))
    after = dataclasses.replace(after, model=made.to(after.dtype))
    if options.allow_uneven:
        for layer in layers:
            size = layer.units.columns.shape[1]
            after.widths[layer.name] = tuple(count * size for count in layer.allowed)
    return after


def _evenly(options: WidthOptions) -> WidthOptions:
    return dataclasses.replace(options, allow_uneven=False, keep_first=None, keep_last=None)


def _quantized(stage: Quantize, before: Shapes, found: Findings) -> Shapes:
    after = _dense(before)
    given = {k: v for k, v in stage.options.items() if k in ("bits", "group_size", "symmetric")}
    whole = {"bits": 4, "group_size": "auto", "symmetric": True, **given}
    default = choose_format(stage.method, **whole)
    plan, dense = plan_formats(after.model, default, stage._formats(), values=False)
    for name, fmt in plan.items():
        _doubtful(name, fmt, after.widths.get(name, ()), found)
    found.left_alone(after.model, dense)
    after.formats = plan
    return after


def _doubtful(
    name: str, fmt: QuantFormat | LutFormat, widths: tuple[int, ...], found: Findings
) -> None:
    """Warn of a width that data may lead to and that the format cannot hold."""
    for K in widths:
        try:
            check_groups({name: (K, fmt)})
        except ValueError as error:
            if not any(name.rpartition(".")[2] in text for text in found.warnings):
                found.warnings.append(
                    f"an uneven pruning before it may leave widths that do not fit: {error}; or a "
                    "round_to that is a multiple of the group size"
                )
            return


def _student(stage: Distill, before: Shapes, original: Shapes, found: Findings) -> Shapes:
    teacher = original if stage.teacher == ORIGINAL else before
    if stage.student == CURRENT:
        made = _dense(before)
    elif isinstance(stage.student, str):
        made = read_shapes(stage.student)
        if made.packed:
            found.errors.append(
                f"student: got {stage.student}, which holds packed layers, expected dense weights to "
                "train"
            )
    else:
        made = _dense(before)
        kept = _chosen(stage.student.get("layers", 1.0), len(find_blocks(made.model)))
        made.model = _fresh(made.model)
        keep_blocks(made.model, kept)
        width = stage.student.get("width", 1.0)
        if width < 1:
            narrow = Prune("mlp", ratio=1 - width)
            made = _narrower(_prune_job(narrow, made.model), _KINDS["mlp"], made, found)
    if not hasattr(settings_of(stage)[0], "answers"):  # as text they suit any vocabulary
        DistillJob(
            made.model, teacher.model, None, None, None, None, 1, TrainOptions(), False
        ).check_tokens()
    made.stored = None
    return made


def tied_embeddings(model: Any) -> str | None:
    """What it means that a model's head is its embedding; None where it has its own."""
    weight = tied_embedding(model)
    if weight is None:
        return None
    rows, width = weight.shape
    return (
        f"embeddings are tied: one matrix of {rows} x {width} embeds the tokens and gives the logits; it "
        "counts once, and no stage compresses it"
    )


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of each dense linear of the decoder blocks, by full name."""
    return {
        f"{prefix}.{name}": shape_of(linear)
        for prefix, block in find_blocks(model).items()
        for name, linear in block_linears(block).items()
    }
