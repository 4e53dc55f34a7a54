"""Zeros that pruning made survive what follows: rounding, code books, training, saving."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmkern
from llmkern import LutFormat, QuantFormat, keep_masks
from llmkern.masks import kept_mask, pruned_layers, recorded_layers
from llmkern.nn import Sparse24Int4Linear, Sparse24Linear
from llmkern.prune import prune

VOCAB, LAYERS = 96, 2


def tiny() -> Any:
    return tiny_models.tiny().train()


def pruned(**amount: Any) -> nn.Module:
    model = tiny()
    prune(model, "magnitude", **(amount or {"pattern": "2:4"}))
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (8, 16))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Dense weights of the layers in the blocks, packed ones expanded."""
    return {
        name: module.dequantize() if hasattr(module, "dequantize") else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def assert_zeros_kept(before: nn.Module, after: nn.Module) -> None:
    new = weights(after)
    for name, old in weights(before).items():
        assert not new[name][old == 0].any(), name
        assert new[name].count_nonzero() > 0.5 * old.count_nonzero(), name


# --- quantizing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_search", [False, True], ids=["minmax", "clip_search"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 3])
def test_rounding_to_nearest_keeps_zeros(bits: int, symmetric: bool, clip_search: bool) -> None:
    model = pruned(sparsity=0.5)
    before = copy.deepcopy(model)
    options = {"group_size": 32, "symmetric": symmetric, "clip_search": clip_search}
    llmkern.quantize(model, "rtn", bits=bits, **options)
    assert_zeros_kept(before, model)


@pytest.mark.parametrize(
    "fmt", [QuantFormat(4, 32), LutFormat("nf4", 64), LutFormat("fp4", 64)], ids=str
)
def test_patched_layers_keep_zeros(fmt: Any) -> None:
    model = pruned()
    before = copy.deepcopy(model)
    llmkern.patch(model, fmt)
    assert_zeros_kept(before, model)


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((w == 0).sum()) for name, w in weights(model).items()}


GPTQ: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"symmetric": False},
    "dynamic": {"group_scales": "dynamic"},
    "three_bits": {"bits": 3},
    "one_pass": {"true_sequential": False, "clip_search": False},
}


@pytest.mark.parametrize("amount", [{"pattern": "2:4"}, {"sparsity": 0.7}], ids=["2:4", "70"])
@pytest.mark.parametrize("case", list(GPTQ))
def test_gptq_keeps_zeros(case: str, amount: dict[str, Any], tokens: Tensor) -> None:
    model = pruned(**amount)
    before = copy.deepcopy(model)
    report = llmkern.quantize(model, "gptq", group_size=32, calibration=tokens, **GPTQ[case])
    assert_zeros_kept(before, model)
    found = zeros(model)
    for layer in report.layers:
        N, K = layer.shape
        assert layer.zeros == pytest.approx(found[layer.name] / (N * K))


def test_gptq_fills_zeros_where_it_is_told_to(tokens: Tensor) -> None:
    model = pruned()
    before = zeros(model)
    llmkern.quantize(model, "gptq", group_size=32, calibration=tokens, keep_zeros=False)
    assert all(found < before[name] for name, found in zeros(model).items())


@pytest.mark.parametrize(
    ("fraction", "recorded", "keep_zeros", "kept"),
    [
        (0.5, False, None, True),
        (0.06, False, None, True),
        (0.04, False, None, False),
        (0.04, True, None, True),
        (0.04, False, True, True),
        (0.5, True, False, False),
        (0.0, True, True, False),
    ],
)
def test_which_zeros_are_kept(
    fraction: float, recorded: bool, keep_zeros: bool | None, kept: bool
) -> None:
    weight = torch.randn(4, 100)
    weight[:, : round(100 * fraction)] = 0
    mask = kept_mask(weight, recorded=recorded, keep_zeros=keep_zeros)
    assert (mask is not None) == kept
    assert mask is None or torch.equal(mask, weight != 0)


def test_pruning_and_quantizing_keeps_the_pattern(tokens: Tensor) -> None:
    model = tiny()
    llmkern.prune(model, "sparsegpt", pattern="2:4", calibration=tokens)
    llmkern.quantize(model, "gptq", bits=4, group_size=32, calibration=tokens)
    for name, weight in weights(model).items():
        assert bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all()), name


def test_a_pruned_model_runs_on_the_sparse_kernels(tokens: Tensor, tmp_path: Path) -> None:
    """2:4, then int4, then accelerate: each step finds the pattern of the one before."""
    model = tiny().eval()
    llmkern.prune(model, "sparsegpt", pattern="2:4", calibration=tokens)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        wanted = dense(input_ids=tokens).logits
        llmkern.accelerate(dense)
        assert torch.allclose(dense(input_ids=tokens).logits, wanted, atol=1e-4)
    assert sum(isinstance(m, Sparse24Linear) for m in dense.modules()) == 7 * LAYERS
    llmkern.quantize(model, "gptq", bits=4, group_size=32, calibration=tokens)
    llmkern.save(model, tmp_path / "out")
    packed = llmkern.load(tmp_path / "out")
    with torch.no_grad():
        wanted = packed(input_ids=tokens).logits
        llmkern.accelerate(packed)
        assert torch.allclose(packed(input_ids=tokens).logits, wanted, atol=1e-4)
    assert sum(isinstance(m, Sparse24Int4Linear) for m in packed.modules()) == 7 * LAYERS


# --- training -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1, nesterov=True),
}


def train(model: nn.Module, tokens: Tensor, optimizer: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "any"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_training_keeps_zeros(kind: str, given: bool, tokens: Tensor) -> None:
    model = pruned().train()
    before = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with keep_masks(model, optimizer if given else None) as masks:
        assert len(masks) == 7 * LAYERS
        assert masks.zeros() == sum(int((w == 0).sum()) for w in weights(before).values())
        train(model, tokens, optimizer)
        gradient = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
        assert not gradient[~masks.masks()["model.layers.0.mlp.up_proj.weight"]].any()
    assert_zeros_kept(before, model)
    old, new = weights(before), weights(model)
    assert all(not torch.equal(old[name], new[name]) for name in old), "the others are trained"


def test_momentum_from_before_does_not_bring_weights_back(tokens: Tensor) -> None:
    model = tiny().train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, tokens, optimizer)
    prune(model, "magnitude", sparsity=0.5)
    before = copy.deepcopy(model)
    with keep_masks(model, optimizer):
        train(model, tokens, optimizer)
    assert_zeros_kept(before, model)


def test_without_masks_training_loses_the_zeros(tokens: Tensor) -> None:
    model = pruned().train()
    masks = keep_masks(model)
    masks.remove()
    train(model, tokens, OPTIMIZERS["adamw"](model.parameters()))
    assert not pruned_layers(model)
    masks.apply()
    assert len(pruned_layers(model)) == 7 * LAYERS


def test_transformers_trainer_keeps_zeros(tokens: Tensor, tmp_path: Path) -> None:
    model = pruned()
    before = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    with keep_masks(model):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert_zeros_kept(before, model)
    assert not torch.equal(
        weights(before)["model.layers.0.mlp.up_proj"], weights(model)["model.layers.0.mlp.up_proj"]
    )


def test_frozen_weights_are_no_obstacle(tokens: Tensor) -> None:
    model = pruned().train()
    model.get_submodule("model.layers.0").requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](p for p in model.parameters() if p.requires_grad)
    with keep_masks(model, optimizer):
        train(model, tokens, optimizer)
    assert_zeros_kept(before, model)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a pruned layer") as e:
        keep_masks(tiny())
    assert "\n" not in str(e.value)


# --- what counts as pruned ------------------------------------------------------------------------


def test_config_remembers_what_was_pruned(tmp_path: Path) -> None:
    model = pruned(sparsity=0.01)
    names = recorded_layers(model)
    assert len(names) == 7 * LAYERS
    assert sorted(pruned_layers(model)) == sorted(names), "1 % of zeros, but recorded"
    llmkern.save(model, tmp_path / "out")
    assert recorded_layers(llmkern.load(tmp_path / "out")) == names
    prune(model, "magnitude", pattern="2:4", rules={"*": None, "*.up_proj": "2:4"})
    assert recorded_layers(model)["model.layers.0.mlp.up_proj"] == "2:4"
    assert len(recorded_layers(model)) == 7 * LAYERS


FILLED = "layers that the config records as pruned have lost their zeros"


def fill(model: nn.Module, name: str = "model.layers.1.mlp.up_proj") -> None:
    """As training without `keep_masks` does."""
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").add_(1e-3)


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
def test_a_record_of_zeros_that_are_gone_is_given_up_and_said(
    amount: dict[str, Any], tmp_path: Path
) -> None:
    model = pruned(**amount)
    fill(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=rf"load: 1 of 14 {FILLED} \(model.layers.1.mlp.up_proj: "):
        assert len(recorded_layers(llmkern.load(tmp_path / "plain"))) == 13
    with pytest.warns(UserWarning, match=f"save: 1 of 14 {FILLED}"):
        llmkern.save(model, tmp_path / "own")
    assert len(recorded_layers(llmkern.load(tmp_path / "own"))) == 13
    fill(model, "model.layers.0.mlp.up_proj")
    with pytest.warns(UserWarning, match=f"quantize: 1 of 13 {FILLED}"):
        llmkern.quantize(model, "rtn", group_size=32)
    assert len(recorded_layers(model)) == 12


def test_a_record_without_a_layer_that_it_is_true_of_goes(tmp_path: Path) -> None:
    model = pruned(pattern="2:4")
    for name in recorded_layers(model):
        fill(model, name)
    with pytest.warns(UserWarning, match=f"save: 14 of 14 {FILLED}"):
        llmkern.save(model, tmp_path / "out")
    assert "llmkern_pruning" not in (tmp_path / "out" / "config.json").read_text()


def test_zeros_that_are_there_are_not_complained_of(tmp_path: Path) -> None:
    model = pruned(pattern="2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        llmkern.quantize(model, "rtn", group_size=32)
        llmkern.save(model, tmp_path / "out")
        assert len(recorded_layers(llmkern.load(tmp_path / "out"))) == 14


def test_zeros_of_unknown_origin_count_from_five_percent() -> None:
    model = tiny()
    with torch.no_grad():
        for i, zeros in enumerate((3, 4)):  # of 64 columns
            model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight")[:, :zeros] = 0
    assert pruned_layers(model) == ["model.layers.1.mlp.up_proj"]


def test_a_dense_model_saves_and_loads_anywhere(tmp_path: Path, tokens: Tensor) -> None:
    model = pruned().eval()
    llmkern.save(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert_zeros_kept(model, plain)
