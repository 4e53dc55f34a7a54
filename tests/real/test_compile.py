"""torch.compile on packed models: the graphs that the dense model has, whatever came before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters

import llmkern
from llmkern import LutFormat, QuantFormat
from llmkern.nn import IntLinear, is_packed

TOKENS = torch.arange(12)[None]
BLOCKS = 10  # more than the recompile limit
FORMATS = {"int4": QuantFormat(4, 32), "int3": QuantFormat(3, 32, False), "nf4": LutFormat()}
KINDS = [*FORMATS, "sparse24", "sparse24_int4"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def dense(**changes: Any) -> Any:
    return tiny(seed=0, std=0.1, **{"num_hidden_layers": BLOCKS} | changes)


def packed(kind: str, **changes: Any) -> Any:
    """A model that has not run yet, and whose layers are as they are in files."""
    model = dense(**changes)
    if kind.startswith("sparse24"):
        for linear in model.model.layers.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data.view(-1, 4)[:, :2] = 0
    if kind != "sparse24":
        llmkern.patch(model, FORMATS.get(kind, QuantFormat(4, 32)))
    if kind.startswith("sparse24"):
        llmkern.accelerate(model)
    for layer in layers(model):
        layer.restore()
    return model


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_packed(module)]


def each_block(model: Any, **options: Any) -> Any:
    for block in model.model.layers:
        block.compile(**{"backend": "eager", "fullgraph": True} | options)
    return model


def run(model: Any) -> Tensor:
    return model(TOKENS, use_cache=False).logits  # type: ignore[no-any-return]


def graphs() -> int:
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    return int(counters["stats"]["unique_graphs"])


# --- one graph for all blocks -----------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "prepared"])
def test_blocks_share_one_graph_before_any_eager_pass(kind: str, prepared: bool) -> None:
    model = packed(kind)
    wanted = run(copy.deepcopy(model))
    if prepared:
        assert llmkern.prepare(model) is model
    assert torch.equal(run(each_block(model)), wanted)
    assert graphs() == 1


def around(model: Any) -> Any:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager", fullgraph=True)
    return model


def after_an_eager_pass(model: Any) -> Any:
    run(model)
    return each_block(model)


def after_a_copy_of_one_that_ran(model: Any) -> Any:
    run(model)
    return each_block(copy.deepcopy(model))


def saved_between(model: Any, tmp_path: Path) -> Any:
    run(each_block(model))
    llmkern.save(model, tmp_path / "out")
    return model


def loaded(model: Any, tmp_path: Path) -> Any:
    llmkern.save(model, tmp_path / "out")
    return each_block(llmkern.load(tmp_path / "out"))


def state_dict_between(model: Any) -> Any:
    run(each_block(model))
    model.load_state_dict(model.state_dict())
    return model


def moved_between(model: Any) -> Any:
    run(each_block(model))
    return model.to("cpu")


def converted(model: Any) -> Any:
    run(model)
    return each_block(model.to(torch.bfloat16))


def with_checkpointing(model: Any) -> Any:
    model.train()
    model.gradient_checkpointing_enable()
    return each_block(model)


SINGLE = [
    around,
    after_an_eager_pass,
    after_a_copy_of_one_that_ran,
    saved_between,
    loaded,
    state_dict_between,
    moved_between,
    converted,
    with_checkpointing,
]


@pytest.mark.parametrize("scenario", SINGLE, ids=lambda scenario: scenario.__name__)
def test_one_graph_stays_one(scenario: Callable[..., Any], tmp_path: Path) -> None:
    model = packed("int4")
    needs = scenario.__code__.co_argcount == 2
    model = scenario(model, tmp_path) if needs else scenario(model)
    run(model).sum().backward()
    assert graphs() == 1


def lengths(model: Any) -> None:
    for n in (12, 13, 14, 1):
        model(torch.arange(n)[None], use_cache=False)


def batches(model: Any) -> None:
    for n in (1, 2, 3):
        model(TOKENS.repeat(n, 1), use_cache=False)


def with_and_without_gradients(model: Any) -> None:
    run(model)
    with torch.no_grad():
        run(model)
    with torch.inference_mode():
        run(model)


def under_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        run(model)


@pytest.mark.parametrize(
    "use",
    [lengths, batches, with_and_without_gradients, under_autocast],
    ids=lambda use: use.__name__,
)
def test_as_many_graphs_as_the_dense_model(use: Callable[[Any], None]) -> None:
    use(each_block(dense(num_hidden_layers=3)))
    wanted = graphs()
    torch._dynamo.reset()
    counters.clear()
    use(each_block(packed("int4", num_hidden_layers=3)))
    assert graphs() == wanted


def test_adapters_on_compiled_blocks() -> None:
    peft = pytest.importorskip("peft")

    def count(model: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).train()
        each_block(model)
        adapted(TOKENS, use_cache=False, labels=TOKENS).loss.backward()
        return graphs()

    assert count(packed("int4")) == count(dense())


@pytest.mark.filterwarnings("ignore:weight. got a write:UserWarning")
def test_a_merge_into_compiled_blocks_tells() -> None:
    peft = pytest.importorskip("peft")
    model = packed("int4", num_hidden_layers=2)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    each_block(model)
    wanted = run(adapted)
    torch.testing.assert_close(run(adapted.merge_and_unload()), wanted)


def test_another_layer_that_cannot_be_prepared_is_not_in_the_way() -> None:
    model = packed("sparse24_int4", num_hidden_layers=2)
    bad = copy.deepcopy(layers(model)[0])
    bad.weight_packed = torch.arange(bad.weight_packed.numel()).int().view_as(bad.weight_packed)
    run(each_block(model))
    assert graphs() == 1


# --- whole models, graphs that leave Python --------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "sparse24"])
def test_the_whole_model_is_one_graph(kind: str) -> None:
    model = packed(kind, num_hidden_layers=2)
    wanted = run(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS, use_cache=False).logits, wanted)
    assert graphs() == 1


def test_generates_with_a_static_cache() -> None:
    model = packed("int4", num_hidden_layers=2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(TOKENS, **options)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = model.generate(TOKENS, cache_implementation="static", **options)
    assert torch.equal(got, wanted)
    assert graphs() == 2, "prefill and decoding"


@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "prepared"])
@pytest.mark.parametrize(
    ("kind", "strict"), [*((kind, False) for kind in KINDS), ("int4", True), ("nf4", True)]
)
def test_is_exported(kind: str, strict: bool, prepared: bool, tmp_path: Path) -> None:
    mlp, x = packed(kind, num_hidden_layers=1).model.layers[0].mlp, torch.randn(3, 64)
    if prepared:
        llmkern.prepare(mlp)
    torch.export.save(torch.export.export(mlp, (x,), strict=strict), tmp_path / "mlp.pt2")
    exported = torch.export.load(tmp_path / "mlp.pt2").module()
    torch.testing.assert_close(exported(x), mlp(x))


class Reads(nn.Module):
    """As T5 does, a model asks a linear for its weight's dtype; another multiplies by it."""

    def __init__(self, kind: str, values: bool) -> None:
        super().__init__()
        self.linear = packed(kind, num_hidden_layers=1).model.layers[0].mlp.up_proj
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.dtype) * self.linear.weight.shape[0]
        if self.values:
            return nn.functional.linear(x, self.linear.weight)
        y: Tensor = self.linear(x)
        return y


@kinds
@pytest.mark.parametrize("values", [False, True], ids=["dtype", "values"])
def test_a_graph_may_read_the_weight(kind: str, values: bool) -> None:
    model, x = Reads(kind, values), torch.randn(3, 64)
    wanted = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(
        torch.export.export(Reads(kind, values), (x,)).module()(x), Reads(kind, values)(x)
    )


def test_inductor_runs_blocks() -> None:
    model = packed("int4", num_hidden_layers=2)
    wanted = run(copy.deepcopy(model))
    torch.testing.assert_close(run(each_block(model, backend="inductor")), wanted)
    assert graphs() == 1


# --- what being prepared changes, and what it does not ----------------------------------------------


@kinds
def test_prepared_layers_are_saved_and_copied_as_ever(kind: str) -> None:
    model = packed(kind, num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    own = {name: layer.own_tensors() for name, layer in model.named_modules() if is_packed(layer)}
    llmkern.prepare(model)
    assert all(layer._layout is not None for layer in layers(model))
    after, copied = model.state_dict(), copy.deepcopy(model).state_dict()
    assert list(before) == list(after) == list(copied)
    assert all(torch.equal(t, after[k]) and torch.equal(t, copied[k]) for k, t in before.items())
    for name, tensors in own.items():
        layer = model.get_submodule(name)
        assert all(torch.equal(layer.own_tensors()[k], t) for k, t in tensors.items())


@kinds
def test_a_prepared_layer_stays_so(kind: str) -> None:
    model = llmkern.prepare(packed(kind, num_hidden_layers=1))
    layouts = [layer._layout for layer in layers(model)]
    model.to("cpu").to(torch.bfloat16).float()
    model.load_state_dict(model.state_dict())
    assert [layer._layout for layer in layers(model)] == layouts


def test_a_prepared_layer_still_shows_its_tensors() -> None:
    layer = IntLinear.from_linear(nn.Linear(64, 32), group_size=32)
    tensors = {name: getattr(layer, name).clone() for name in ("weight_packed", "weight_scale")}
    layer.prepare()
    assert all(torch.equal(getattr(layer, name), tensor) for name, tensor in tensors.items())
    assert layer.weight_zero_point is None


def test_loading_prepares(tmp_path: Path) -> None:
    llmkern.save(packed("int4", num_hidden_layers=1), tmp_path / "out")
    model = llmkern.load(tmp_path / "out")
    assert all(layer._layout is not None for layer in layers(model))
