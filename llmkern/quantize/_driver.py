"""`quantize`: checks, the plan, and the work, one decoder block at a time."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate import Block, HessianStatistic, load_windows, walk
from llmkern.calibrate.data import Source
from llmkern.formats.int4 import QuantFormat
from llmkern.models import block_linears, find_blocks
from llmkern.nn import Int4Linear
from llmkern.nn._packed_linear import dense_weight
from llmkern.nn.int4_linear import BITS
from llmkern.ops._library import FLOATS
from llmkern.patch import plan_patch, record_formats, warn_dense, winning_pattern
from llmkern.quantize._report import LayerReport, QuantizedWeight, QuantizeReport
from llmkern.quantize.gptq import GptqOptions, gptq
from llmkern.quantize.rtn import RtnOptions, rtn

METHODS: dict[str, type] = {"gptq": GptqOptions, "rtn": RtnOptions}

_Formats = dict[str, QuantFormat]


@dataclass(frozen=True)
class DataOptions:
    """How the calibration data is cut and fed.

    Attributes:
        samples: windows.
        seq_len: tokens per window; None takes a tensor's own width, else 512.
        seed: of the choice of windows.
        batch_size: windows per forward.
    """

    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int = 8


def quantize(
    model: nn.Module,
    method: str = "gptq",
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    rules: Mapping[str, QuantFormat | None] | None = None,
    calibration: Source = None,
    tokenizer: Any = None,
    progress: bool = False,
    **options: Any,
) -> QuantizeReport:
    """Quantize the linears in the decoder blocks of `model`, in place.

    Every linear becomes an `Int4Linear`; embeddings, norms and the head stay as they are. GPTQ walks
    the blocks in order, each calibrated on the output of the compressed ones before it, and holds one
    block's statistics and the hidden states of the calibration windows beyond the model itself.

    Args:
        model: a causal language model in float32, bfloat16 or float16.
        method: "gptq", or "rtn" (round to nearest, no calibration).
        bits: 2, 3 or 4.
        group_size: K-elements per scale, a divisor of every layer's K; None for one scale per row.
        symmetric: no zero points.
        rules: glob over full layer names -> `QuantFormat` for those layers, or None to leave them
            dense; the first that matches counts.
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text
            that comes with llmkern.
        tokenizer: needed where the calibration is text.
        progress: show a progress bar with the layer, its loss and the time left.
        options: those of the method (`GptqOptions`: damp, act_order, group_scales, clip_search,
            true_sequential; `RtnOptions`: clip_search), and for GPTQ those of `DataOptions`: samples,
            seq_len, seed, batch_size.

    Returns:
        The report: per layer its format, loss, damping and time; what stayed dense and why.

    Raises:
        ValueError: an unknown method or option, a group size that does not divide a layer's K, a rule
            that matches nothing, NaN or Inf in a weight (the layer is named), bad calibration data:
            all before the model is touched. NaN or Inf in a layer's calibration activations.
        NotImplementedError: 8 bits, or an encoder-decoder model.

    Warns:
        RuntimeWarning: experts that stay dense; a layer that had to be rounded to nearest because its
            Hessian could not be factored; after an error in the middle, which layers were replaced.
    """
    start = time.perf_counter()
    settings, data = _options(method, options)
    plan, dense = _plan(model, _format(bits, group_size, symmetric), dict(rules or {}))
    report = QuantizeReport(method, dataclasses.asdict(settings), dense=dense)
    if isinstance(settings, RtnOptions):
        with _Work(model, plan, report, progress) as work:
            for prefix, block in find_blocks(model).items():
                for name in block_linears(block):
                    work.compress(prefix, block, name, partial(rtn, options=settings))
    else:
        windows = load_windows(
            calibration,
            model,
            tokenizer,
            seq_len=data.seq_len,
            samples=data.samples,
            seed=data.seed,
        )
        report.tokens, report.window = windows.numel(), windows.shape[1]
        with _Work(model, plan, report, progress) as work:
            stage = _gptq_stage(work, settings, windows.numel())
            walk(model, windows, stage, batch_size=data.batch_size)
    report.seconds = time.perf_counter() - start
    return report


def _gptq_stage(work: _Work, settings: GptqOptions, tokens: int) -> Callable[[Block], None]:
    """GPTQ of one block: statistics and layers in the order of execution."""

    def stage(block: Block) -> None:
        def empty(group: tuple[str, ...]) -> HessianStatistic:
            weight = dense_weight(block.module.get_submodule(group[0]))
            return HessianStatistic(weight.shape[1], tokens=tokens, device=weight.device)

        planned = [tuple(n for n in g if work.plans(block.name, n)) for g in block.groups()]
        groups = [group for group in planned if group]
        for sweep in [[group] for group in groups] if settings.true_sequential else [groups]:
            work.say(f"{block.name} (inputs)")
            statistics = block.collect(sweep, empty)
            for group in sweep:
                method = partial(gptq, statistic=statistics.pop(0), options=settings)
                for name in group:
                    work.compress(block.name, block.module, name, method)

    return stage


class _Work:
    """Replaces planned layers one by one; keeps the report and the progress bar."""

    def __init__(
        self, model: nn.Module, plan: _Formats, report: QuantizeReport, progress: bool
    ) -> None:
        from tqdm import tqdm

        self._model = model
        self._plan = plan
        self._report = report
        # disable=None: no bar where standard error is no terminal.
        self._bar = tqdm(total=len(plan), unit="layer", disable=None if progress else True)

    def __enter__(self) -> _Work:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.close()
        done = self._report.layers
        if done:
            # Also after an error: the config then still says what the model holds.
            record_formats(self._model)
        if exc is not None and done:
            warnings.warn(
                f"quantize: stopped after {len(done)} of {len(self._plan)} layers; {done[0].name} to "
                f"{done[-1].name} are already quantized",
                RuntimeWarning,
                stacklevel=3,
            )

    def plans(self, prefix: str, name: str) -> bool:
        """Whether the layer `name` of the block `prefix` is to be quantized."""
        return f"{prefix}.{name}" in self._plan

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.set_description(text)

    def compress(
        self,
        prefix: str,
        block: nn.Module,
        name: str,
        method: Callable[[Tensor, QuantFormat], QuantizedWeight],
    ) -> None:
        """Replace the linear `name` of a block by its packed form, if that is planned."""
        full = f"{prefix}.{name}"
        fmt = self._plan.get(full)
        if fmt is None:
            return
        self.say(full)
        start = time.perf_counter()
        linear = block.get_submodule(name)
        weight = dense_weight(linear)
        try:
            with torch.no_grad():
                result = method(weight, fmt)
                packed = _pack(linear, weight, result, fmt)
        except ValueError as error:
            raise ValueError(f"{full}: {error}") from error
        block.set_submodule(name, packed)
        if not result.factored:
            warnings.warn(
                f"{full}: rounded to nearest, because no token reached it or its Hessian could not be "
                "factored at any damping",
                RuntimeWarning,
                stacklevel=2,
            )
        N, K = weight.shape
        self._report.layers.append(
            LayerReport(
                name=full,
                shape=(N, K),
                bits=fmt.bits,
                group_size=fmt.groups(K),
                symmetric=fmt.symmetric,
                loss=result.loss,
                relative_loss=result.relative_loss,
                damp=result.damp,
                factored=result.factored,
                seconds=time.perf_counter() - start,
            )
        )
        self._bar.set_postfix(loss=f"{result.relative_loss:.2e}", refresh=False)
        self._bar.update()


def _pack(
    linear: nn.Module, weight: Tensor, result: QuantizedWeight, fmt: QuantFormat
) -> Int4Linear:
    packed = Int4Linear.from_parts(
        result.codes,
        result.scales,
        result.zeros,
        getattr(linear, "bias", None),
        bits=fmt.bits,
        group_size=fmt.group_size,
        dtype=weight.dtype,
    )
    return packed.train(linear.training)


def _options(method: str, options: dict[str, Any]) -> tuple[GptqOptions | RtnOptions, DataOptions]:
    """Sort `options` into the method's and the data's; refuse what belongs to neither."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    kinds: tuple[type, ...] = (METHODS[method], DataOptions)
    known = [{f.name for f in dataclasses.fields(kind)} for kind in kinds]
    for name in options:
        if not any(name in names for names in known):
            expected = ", ".join(sorted(set().union(*known)))
            raise ValueError(f"{name}: not an option of method {method!r}, expected {expected}")
    own, data = ({k: v for k, v in options.items() if k in names} for names in known)
    return METHODS[method](**own), DataOptions(**data)


def _format(bits: int, group_size: int | None, symmetric: bool) -> QuantFormat:
    fmt = QuantFormat(bits, group_size, symmetric)
    _check_bits(fmt, "bits")
    return fmt


def _check_bits(fmt: QuantFormat, argument: str) -> None:
    if fmt.bits not in BITS:
        raise NotImplementedError(
            f"{argument}: got {fmt.bits} bits, expected one of {BITS}: no packed linear layer holds "
            "other widths yet"
        )


def _plan(
    model: nn.Module, default: QuantFormat, rules: dict[str, QuantFormat | None]
) -> tuple[_Formats, dict[str, str]]:
    """Format of each layer to quantize, all of it checked, and why each other one stays dense."""
    blocks = find_blocks(model)
    inside = {
        f"{prefix}.{name}": linear
        for prefix, block in blocks.items()
        for name, linear in block_linears(block).items()
    }
    if not inside:
        raise ValueError(f"model: got no dense linear in {blocks.name}, expected some to quantize")
    for pattern, fmt in rules.items():
        if fmt is not None and not isinstance(fmt, QuantFormat):
            raise ValueError(f"rules: got {fmt!r} for {pattern!r}, expected a QuantFormat or None")
        if fmt is not None:
            _check_bits(fmt, f"rules[{pattern!r}]")
        if not any(fnmatchcase(name, pattern) for name in inside):
            raise ValueError(
                f"rules: got {pattern!r}, which matches no linear in {blocks.name}; they are named "
                f"like {next(iter(inside))!r}"
            )
    rule = {"*": default, **rules}
    _check_groups(rule, inside)
    choice = plan_patch(model, rule)
    dense = dict(choice.left)
    plan = {}
    for name, wanted in choice.replaced.items():
        assert isinstance(wanted, QuantFormat)  # checked above
        if name in inside:
            _check_values(name, inside[name])
            plan[name] = wanted
        else:
            dense[name] = f"outside the decoder blocks ({blocks.name})"
    warn_dense("quantize", {name: dense[name] for name in choice.unexpected})
    return plan, dense


def _check_groups(rule: Mapping[str, QuantFormat | None], linears: dict[str, nn.Module]) -> None:
    bad = []
    for name, linear in linears.items():
        pattern = winning_pattern(rule, name)
        fmt = None if pattern is None else rule[pattern]
        K = dense_weight(linear).shape[1]
        if fmt is not None and fmt.group_size is not None and K % fmt.group_size:
            bad.append((name, K, fmt.group_size))
    if bad:
        name, K, size = bad[0]
        fits = [str(g) for g in (128, 64, 32) if K % g == 0] or ["None (one scale per row)"]
        more = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise ValueError(
            f"group_size: got {size}, which does not divide K = {K} of {name}{more}; expected a divisor "
            f"such as {fits[0]}, or rules={{{name!r}: None}} to leave the layer dense"
        )


def _check_values(name: str, linear: nn.Module) -> None:
    weight = linear.get_parameter("weight")
    if weight.is_meta or weight.dtype not in FLOATS:
        kind = "a weight without data" if weight.is_meta else f"a {weight.dtype} weight"
        raise ValueError(f"{name}: got {kind}, expected float32, bfloat16 or float16")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: its weight holds NaN or Inf, expected finite numbers")
