"""The units inside a decoder block: MLP neurons and groups of attention heads.

A unit is made by rows of some linears (producers) and read by columns of one (the consumer), and can
be taken out of the block with all of them:

    neuron j        rows j of gate and up (or of the first of two matrices), column j of down
    key/value head  its rows of k and v, the rows of the query heads that read it, their columns of o
    query head      where all read one key/value head: its rows of q, its columns of o

Found by running the model on a few tokens: producers are the linears of one module that read the same
tensor, the consumer is the one called after them. How the rows of a fused projection are arranged is
found by changing those of one unit and looking at what the consumer then reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import overflow_hint
from llmkern.models.blocks import (
    block_linears,
    check_reads_text,
    evaluation_mode,
    find_blocks,
    run_on_tokens,
    vocabulary_size,
)
from llmkern.models.linears import bias_of, find_linears, is_linear, shape_of, weight_rows

_PROBE_TOKENS = 8
# Names of the size of a head among an attention module's own attributes.
_HEAD_SIZES = ("head_dim", "head_size")
# What models call norms of queries and keys.
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm")
KINDS = ("glu", "mlp", "attention")


@dataclass(frozen=True)
class Units:
    """The units of one hidden layer of a block.

    Attributes:
        kind: "glu" (gate, up and down), "mlp" (two matrices) or "attention" (key/value heads with their
            query heads).
        producers: name inside the block -> int64 [units, rows], the rows of its weight that make each
            unit.
        consumer: name inside the block of the linear that reads the units.
        columns: int64 [units, columns], the columns of its weight that read each unit.
        head_dim: width of a head; None for neurons.
        one_key: all query heads read one key/value head, which stays; each of them is a unit.
        fixed: name of a producer -> int64 [rows], those of its rows that belong to no unit and stay.
    """

    kind: str
    producers: dict[str, Tensor]
    consumer: str
    columns: Tensor
    head_dim: int | None = None
    one_key: bool = False
    fixed: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.columns.shape[0]

    @property
    def what(self) -> str:
        """For messages."""
        if self.kind != "attention":
            return "neurons"
        return "query heads" if self.one_key else "key/value heads"

    def rows(self, name: str, kept: Tensor) -> Tensor:
        """The rows of a producer, ascending, that are left with the units `kept`."""
        own = self.producers[name][kept].flatten()
        return torch.cat((own, self.fixed[name]) if name in self.fixed else (own,)).sort().values

    @property
    def heads(self) -> int:
        """Query heads of one unit."""
        return self.columns.shape[1] // (self.head_dim or 1)

    def parameters_per_unit(self, block: nn.Module) -> int:
        """Weights and biases that go with one unit."""
        count = self.columns.shape[1] * shape_of(block.get_submodule(self.consumer))[0]
        for name, rows in self.producers.items():
            linear = block.get_submodule(name)
            has_bias = bias_of(linear) is not None
            count += rows.shape[1] * (shape_of(linear)[1] + has_bias)
        return count


def find_units(model: nn.Module) -> list[list[Units]]:
    """The units of every decoder block of `model`, in the order of execution.

    A block whose layers have another structure (MoE experts, latent attention), or whose linears are
    packed, has fewer kinds of units, or none.

    Args:
        model: a causal language model. Without data in its weights (on the meta device) shapes alone
            decide, which tells kinds and numbers of units, but not how a fused projection is arranged.

    Raises:
        ValueError: the model reads no text; the blocks were not found, or not run; NaN or Inf in their
            activations (the layer is named).
    """
    check_reads_text(model)
    blocks = find_blocks(model)
    found: list[list[Units]] = []
    with torch.no_grad(), evaluation_mode(model):
        for (name, block), call in zip(blocks.items(), _calls(model, blocks.modules), strict=True):
            try:
                found.append(block_units(block, call))
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
    return found


def why_missing(block: nn.Module, kinds: Sequence[str]) -> str:
    """Why a block has no units of these kinds, as far as its modules tell."""
    modules = dict(block.named_modules())
    parameters = dict(block.named_parameters())
    if any(is_linear(m) and m._parameters.get("weight") is None for m in modules.values()):
        return "its layers are packed"
    if "attention" in kinds:
        if any(getattr(m, "is_kv_shared_layer", False) for m in modules.values()):
            return "it reads the keys and values of an earlier block"
        if any("kv_a_" in name for name in modules):
            return "its keys and values are made of one latent vector (MLA)"
        for name in modules:
            parent, _, last = name.rpartition(".")
            norm = parameters.get(f"{name}.weight")
            if (
                last in _HEAD_NORMS
                and norm is not None
                and norm.numel() != _head_dim(modules[parent])
            ):
                return f"{name} normalises all heads together, and fewer of them differently"
    elif any("expert" in name for name in parameters):
        return "its neurons are those of MoE experts"
    return "its layers are of another structure"


_Run = Callable[[], Any]


def _calls(model: nn.Module, blocks: nn.ModuleList) -> list[_Run]:
    """For each block, a function that runs it as the model does, on a few tokens."""
    runs: dict[int, _Run] = {}

    def keep(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Copies: a block may change its input in place.
            held = [_fresh(a) for a in args]
            named = {k: _fresh(v) for k, v in kwargs.items()}
            runs[index] = lambda: block(
                *(_fresh(a) for a in held), **{k: _fresh(v) for k, v in named.items()}
            )

        return hook

    vocabulary = vocabulary_size(model) or _PROBE_TOKENS
    tokens = torch.arange(_PROBE_TOKENS, device=next(model.parameters()).device) % vocabulary
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(keep(index), with_kwargs=True)
            stack.callback(handle.remove)
        run_on_tokens(model, tokens[None])
    if len(runs) != len(blocks):
        idle = next(index for index in range(len(blocks)) if index not in runs)
        raise ValueError(
            f"model: got {type(model).__name__}, whose block {idle} ({type(blocks[idle]).__name__}) does "
            "not run on text, expected blocks that run one after the other"
        )
    return [runs[index] for index in range(len(blocks))]


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def block_units(block: nn.Module, run: _Run) -> list[Units]:
    """The units of one block, which `run` runs on a few tokens."""
    reads = linear_inputs(block, run)
    by_parent: dict[str, list[str]] = {}
    for name in reads:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    dense = block_linears(block)
    found = []
    for parent, names in by_parent.items():
        if any(name not in dense for name in names):
            continue
        first = reads[names[0]]
        producers = [name for name in names if same_tensor(reads[name], first)]
        rest = [name for name in names if name not in producers]
        if len(rest) != 1:
            continue
        for candidate in _candidates(block, block.get_submodule(parent), producers, rest[0]):
            if _holds(block, run, candidate):
                found.append(candidate)
                break
    return found


def linear_inputs(block: nn.Module, run: _Run) -> dict[str, Tensor]:
    """What each linear that is called once reads, by name, in the order of the calls."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    with ExitStack() as stack:
        for name, linear in find_linears(block).items():
            stack.callback(linear.register_forward_pre_hook(record(name)).remove)
        run()
    return {name: inputs[0] for name, inputs in seen.items() if len(inputs) == 1}


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, both alive, are the same data, however they are shaped."""
    if a.is_meta:  # no addresses
        return a is b
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a._version == b._version


def _candidates(
    block: nn.Module, parent: nn.Module, producers: list[str], consumer: str
) -> Iterator[Units]:
    """What the linears of one module may be, by their shapes."""
    made = [shape_of(block.get_submodule(name))[0] for name in producers]
    width = shape_of(block.get_submodule(consumer))[1]
    head_dim = _head_dim(parent)
    if head_dim and width % head_dim == 0 and all(n % head_dim == 0 for n in made):
        sizes = {width, *made} - {head_dim}
        if any(sizes & {*p.shape} for p in _others(parent, block, [*producers, consumer])):
            return  # a norm over all heads
        yield from _attention(producers, made, consumer, width, head_dim)
        return
    if any(width in p.shape for p in _others(parent, block, [*producers, consumer])):
        return  # a convolution, a recurrence or a norm of the units
    units = torch.arange(width)[:, None]
    if made == [width] or made == [width, width]:
        kind = "mlp" if len(made) == 1 else "glu"
        yield Units(kind, dict.fromkeys(producers, units), consumer, units)
    elif made == [2 * width]:
        halves = torch.cat((units, units + width), 1)  # [gate | up]
        pairs = torch.cat((2 * units, 2 * units + 1), 1)  # gate and up of a neuron side by side
        for rows in (halves, pairs):
            yield Units("glu", {producers[0]: rows}, consumer, units)


def _head_dim(attention: nn.Module) -> int:
    return next((size for n in _HEAD_SIZES if (size := getattr(attention, n, 0))), 0)


def _others(parent: nn.Module, block: nn.Module, linears: list[str]) -> Iterator[nn.Parameter]:
    """Parameters inside a module that are not those of these linears of the block."""
    own = {id(p) for name in linears for p in block.get_submodule(name).parameters()}
    if parent is not block:
        yield from (p for p in parent.parameters() if id(p) not in own)


def _attention(
    producers: list[str], made: list[int], consumer: str, width: int, head_dim: int
) -> Iterator[Units]:
    heads = width // head_dim
    if len(producers) == 3:
        kv_heads = min(made) // head_dim
        if heads % kv_heads or any(n % min(made) for n in made):
            return
        if kv_heads == 1 and heads > 1:
            each = torch.arange(width).view(heads, -1)
            queries = {n: each for n, size in zip(producers, made, strict=True) if size == width}
            yield Units("attention", queries, consumer, each, head_dim, one_key=True)
            return
        rows = {
            name: torch.arange(n).view(kv_heads, -1)
            for name, n in zip(producers, made, strict=True)
        }
        yield Units("attention", rows, consumer, torch.arange(width).view(kv_heads, -1), head_dim)
    elif len(producers) == 1:
        kv_heads = (made[0] // head_dim - heads) // 2
        if kv_heads < 1 or heads % kv_heads or (heads + 2 * kv_heads) * head_dim != made[0]:
            return
        if kv_heads == 1 and heads > 1:
            each = torch.arange(width).view(heads, -1)
            fixed = {producers[0]: torch.arange(width, made[0])}
            queries = {producers[0]: each}
            yield Units("attention", queries, consumer, each, head_dim, one_key=True, fixed=fixed)
            return
        q, k, v = torch.split(torch.arange(made[0]), [width, *[kv_heads * head_dim] * 2])
        apart = torch.cat([part.view(kv_heads, -1) for part in (q, k, v)], 1)  # [q | k | v]
        together = torch.arange(made[0]).view(kv_heads, -1)  # q, k and v of each group side by side
        columns = torch.arange(width).view(kv_heads, -1)
        for layout in (apart, together):
            yield Units("attention", {producers[0]: layout}, consumer, columns, head_dim)


def _holds(block: nn.Module, run: _Run, units: Units) -> bool:
    """Whether changing a unit's rows changes what its own columns read, and nothing else."""
    if weight_rows(block.get_submodule(units.consumer)).is_meta:
        return True
    before = _read_by(block, run, units.consumer)
    for unit in sorted({0, len(units) // 2, len(units) - 1}):
        with _disturbed(block, units, unit):
            change = (_read_by(block, run, units.consumer) - before).abs().amax(0)
        own = torch.zeros_like(change, dtype=torch.bool)
        own[units.columns[unit].to(change.device)] = True
        # Not zero: another tiling may round the untouched columns differently.
        if not change.max() > 0 or bool((change[~own] > 0.01 * change.max()).any()):
            return False
    return True


def _read_by(block: nn.Module, run: _Run, consumer: str) -> Tensor:
    seen: list[Tensor] = []
    linear = block.get_submodule(consumer)
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        run()
    finally:
        handle.remove()
    read = seen[0].reshape(-1, seen[0].shape[-1]).float()
    if not bool(torch.isfinite(read).all()):
        raise ValueError(
            f"{consumer}: its inputs hold NaN or Inf, expected finite numbers"
            f"{overflow_hint(seen[0].dtype)}"
        )
    return read


@contextmanager
def _disturbed(block: nn.Module, units: Units, unit: int) -> Iterator[None]:
    """The rows of one unit in every producer replaced by others, then put back."""
    kept = []
    for name, rows in units.producers.items():
        linear = block.get_submodule(name)
        weight, chosen = weight_rows(linear), rows[unit].to(weight_rows(linear).device)
        kept.append((weight, chosen, weight[chosen].clone()))
        bias = bias_of(linear)
        if bias is not None:
            kept.append((bias, chosen, bias[chosen].clone()))
    try:
        for tensor, chosen, old in kept:
            # The other sign wakes a unit that its activation function keeps silent; noise, one that is
            # zero.
            noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(0)).to(old)
            tensor[chosen] = noise * tensor.square().mean().sqrt() - 2 * old
        yield
    finally:
        for tensor, chosen, old in kept:
            tensor[chosen] = old
