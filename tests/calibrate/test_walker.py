"""The walk: statistics equal those of a plain forward, one block at a time, everything restored."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern.calibrate import Block, HessianStatistic, Statistic, walk
from llmkern.models import block_linears, find_blocks
from llmkern.testing import TensorPeak, assert_matches

VOCAB, WIDTH, LAYERS = 96, 32, 3


tiny_llama = partial(
    tiny_models.tiny, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS
)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (6, 16))


def hessians(group: tuple[str, ...], block: Block, tokens: Tensor) -> HessianStatistic:
    K = block.module.get_submodule(group[0]).in_features
    return HessianStatistic(K, tokens=tokens.numel())


class Inputs:
    """Statistic that keeps all it is fed."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x.detach().clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hessians_equal_those_of_a_plain_forward(dtype: torch.dtype, tokens: Tensor) -> None:
    model = tiny_llama(dtype=dtype).eval()
    seen: dict[str, list[Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda m, args, name=f"{prefix}.{name}": seen.setdefault(name, []).append(args[0])
        )
        for prefix, block in find_blocks(model).items()
        for name, linear in block_linears(block).items()
    ]
    with torch.no_grad():
        for rows in tokens.split(4):
            model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    checked = []

    def stage(block: Block) -> None:
        groups = block.groups()
        for group, statistic in zip(
            groups, block.collect(groups, lambda g: hessians(g, block, tokens)), strict=True
        ):
            assert statistic.rows == tokens.numel()
            for name in group:
                x = torch.cat([s.flatten(0, 1) for s in seen[f"{block.name}.{name}"]])
                spec = 2 / len(x) * (x.double().T @ x.double()).tril()
                like = (2 / len(x) * (x.float().T @ x.float())).tril()
                assert_matches(statistic.finish(), spec, like)
                checked.append(name)

    walk(model, tokens, stage, batch_size=4, compute=dtype_name(dtype))
    assert len(checked) == 7 * LAYERS


def test_shared_inputs_are_taken_in_once(tokens: Tensor) -> None:
    def stage(block: Block) -> None:
        groups = block.groups()
        assert [len(group) for group in groups] == [3, 1, 2, 1]
        for group, fed in zip(groups, block.collect(groups, lambda g: Inputs()), strict=True):
            assert [x.shape[0] for x in fed.seen] == [4, 2], group

    walk(tiny_llama(), tokens, stage, batch_size=4)


def test_one_group_runs_the_block_no_further_than_it_must(tokens: Tensor) -> None:
    model = tiny_llama()
    ran: list[str] = []
    for block in find_blocks(model).modules:
        block.mlp.register_forward_pre_hook(lambda m, a: ran.append("mlp"))

    def stage(block: Block) -> None:
        groups = block.groups()
        ran.clear()
        block.collect(groups[:2], lambda g: Inputs())
        assert not ran

    walk(model, tokens, stage)


def test_next_block_reads_the_output_of_the_changed_one(tokens: Tensor) -> None:
    model = tiny_llama()
    entering: list[Tensor] = []

    def silence(block: Block) -> None:
        """Leave the block its residual connection only."""
        entering.append(block.states.hidden.clone())
        nn.init.zeros_(block.module.get_parameter("self_attn.o_proj.weight"))
        nn.init.zeros_(block.module.get_parameter("mlp.down_proj.weight"))

    walk(model, tokens, silence)
    assert all(torch.equal(hidden, entering[0]) for hidden in entering[1:])


def test_later_groups_see_what_was_changed_before_them(tokens: Tensor) -> None:
    def stage(block: Block) -> None:
        *_, down = block.groups()
        nn.init.zeros_(block.module.get_parameter("mlp.up_proj.weight"))
        (fed,) = block.collect([down], lambda g: Inputs())
        assert all(not x.any() for x in fed.seen)

    walk(tiny_llama(), tokens, stage)


def test_one_block_is_held_at_a_time(tokens: Tensor) -> None:
    """Hidden states live in one buffer, and dropped statistics are gone before the next block."""
    alive: weakref.WeakSet[HessianStatistic] = weakref.WeakSet()
    buffers = set()

    def stage(block: Block) -> None:
        gc.collect()
        assert not alive
        buffers.add(block.states.hidden.data_ptr())
        assert block.states.hidden.shape == (*tokens.shape, WIDTH)
        groups = block.groups()
        statistics = block.collect(groups, lambda g: hessians(g, block, tokens))
        alive.update(statistics)
        assert len(alive) == len(groups)

    walk(tiny_llama(), tokens, stage, batch_size=2)
    assert len(buffers) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks() -> None:
    tokens = torch.randint(0, VOCAB, (16, 32))

    def peak(layers: int) -> int:
        model = tiny_llama()
        blocks = find_blocks(model).modules
        del blocks[layers:]
        model.config.num_hidden_layers = layers

        def stage(block: Block) -> None:
            gc.collect()
            groups = block.groups()
            block.collect(groups, lambda g: hessians(g, block, tokens))

        with TensorPeak(model) as watch:
            walk(model, tokens, stage, batch_size=1)
        return watch.most

    # One block's statistics alone are 20 % of the peak.
    assert peak(3) <= peak(1) * 1.1


def state(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            module.training,
            "forward" in module.__dict__,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("where", ["capture", "stage", "forward", "update"])
def test_model_is_restored_after_an_exception(tokens: Tensor, where: str) -> None:
    model = tiny_llama().train()
    model.lm_head.eval()
    before = state(model)

    class Broken(Inputs):
        def update(self, x: Tensor) -> None:
            raise KeyboardInterrupt

    def stage(block: Block) -> None:
        if where == "stage":
            raise KeyboardInterrupt
        if where == "forward":
            block.run(99)
        block.collect(block.groups(), lambda g: Broken())

    if where == "capture":
        tokens = tokens + VOCAB  # outside the embedding
    with pytest.raises((KeyboardInterrupt, IndexError)):
        walk(model, tokens, stage)
    assert state(model) == before


def test_model_is_restored_after_a_walk(tokens: Tensor) -> None:
    model = tiny_llama().train()
    before = state(model)
    modes = []
    walk(model, tokens, lambda block: modes.append(block.module.training))
    assert modes == [False] * LAYERS
    assert state(model) == before


class TupleBlock(nn.Module):
    """A block as older code writes it: keyword input, tuple output, input changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, *, hidden_states: Tensor, scale: float) -> tuple[Tensor, None]:
        hidden_states.mul_(scale)
        y = self.a(hidden_states)
        hidden_states.add_(1)
        return self.b(hidden_states) + y, None


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([TupleBlock(), TupleBlock()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embedding(input_ids)
        for depth, layer in enumerate(self.layers):
            x = layer(hidden_states=x, scale=1.0 + depth)[0]
        return x


def test_tuples_keywords_and_in_place_changes_are_handled(tokens: Tensor) -> None:
    model = TupleModel()
    outputs: list[Tensor] = []

    def stage(block: Block) -> None:
        # a and b read the same memory, changed in between: not the same input.
        assert block.groups() == [("a",), ("b",), ("unused",)]
        for fed in block.collect(block.groups(), lambda g: Inputs()):
            assert len(fed.seen) in (0, 2)
        outputs[:] = [block.run(i) for i in range(block.states.batches())]

    walk(model, tokens, stage, batch_size=3)
    with torch.no_grad():
        want = torch.cat([model(rows) for rows in tokens.split(3)])
    assert torch.equal(torch.cat(outputs), want)


def test_statistic_names_nan_and_missing_inputs() -> None:
    statistic = HessianStatistic(4, tokens=2)
    with pytest.raises(ValueError, match="no calibration input"):
        statistic.finish()
    statistic.update(torch.tensor([[1.0, 2.0, torch.nan, 0.0]]))
    with pytest.raises(ValueError, match="calibration activations hold NaN or Inf"):
        statistic.finish()


def test_statistic_corrects_for_rows_that_never_came() -> None:
    """An expert sees some of the tokens; its Hessian is still the mean over those it saw."""
    x = torch.randn(10, 4)
    some, all_of_them = HessianStatistic(4, tokens=40), HessianStatistic(4, tokens=10)
    some.update(x)
    all_of_them.update(x)
    torch.testing.assert_close(some.finish(), all_of_them.finish())


def test_factor_is_shared_by_all_that_ask_with_the_same_setting() -> None:
    statistic = HessianStatistic(8, tokens=32)
    statistic.update(torch.randn(32, 8))
    first = statistic.factor(damp=0.01, act_order=True)
    assert statistic.factor(damp=0.01, act_order=True) is first
    assert statistic.factor(damp=0.01, act_order=False) is not first


def test_any_object_with_update_is_a_statistic() -> None:
    statistics: list[Statistic] = [Inputs(), HessianStatistic(4, tokens=1)]
    assert all(callable(statistic.update) for statistic in statistics)


@pytest.mark.parametrize(
    ("tokens", "batch_size", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), 8, r"tokens: got torch.int64 \[0, 4\]"),
        (torch.zeros(4, dtype=torch.int64), 8, r"tokens: got torch.int64 \[4\]"),
        (torch.zeros(4, 4), 8, r"tokens: got torch.float32 \[4, 4\]"),
        (torch.zeros(4, 4, dtype=torch.int64), 0, "batch_size: got 0"),
    ],
    ids=["empty", "one_dimension", "floats", "no_batch"],
)
def test_bad_arguments_are_named(tokens: Tensor, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk(tiny_llama(), tokens, lambda block: None, batch_size=batch_size)
