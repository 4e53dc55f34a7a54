"""The dtype that models are run in: chosen by the processor, and gone afterwards."""

import pytest
import torch

import llmkern
from llmkern.calibrate import HessianStatistic, walk
from llmkern.models import cast_floats, compute, compute_dtype, compute_note, computing_in
from llmkern.nn import IntLinear
from llmkern.testing import relative_error
from tests.helpers.tiny_models import tiny

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("own", "asked", "native", "expected"),
    [
        (BF16, "auto", False, F32),
        (F16, "auto", False, F32),
        (BF16, "auto", True, BF16),
        (F32, "auto", False, F32),
        (BF16, "bfloat16", False, BF16),
        (BF16, "float32", True, F32),
    ],
)
def test_is_float32_where_the_processor_is_slow(own, asked, native, expected, monkeypatch):
    monkeypatch.setattr(compute, "_is_native", lambda dtype: native)
    model = torch.nn.Linear(4, 4, dtype=own)
    assert compute_dtype(model, asked) == expected
    note = compute_note(model, expected)
    assert (note is None) == (own == expected)


@pytest.mark.parametrize("asked", ["bfloat16", "int8", "bf16", ""])
def test_other_dtypes_are_refused(asked):
    with pytest.raises(ValueError, match=r"compute_dtype: got .*, expected one of auto, float32"):
        compute_dtype(torch.nn.Linear(4, 4), asked)


def test_a_processor_without_wide_vectors_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(compute.platform, "machine", lambda: "x86_64")
    compute._is_native.cache_clear()
    assert not compute._is_native(BF16)
    compute._is_native.cache_clear()


def test_weights_are_back_bit_for_bit_after_an_error():
    model = tiny("llama", dtype=BF16, seed=0)
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}

    def fail():
        assert {p.dtype for p in model.parameters()} == {F32}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), computing_in(model, F32):
        fail()
    for name, tensor in model.state_dict().items():
        assert (tensor.data_ptr(), tensor.dtype) == (before[name][0], BF16)
        assert torch.equal(tensor, before[name][1])


def test_packed_layers_keep_their_scales():
    layer = IntLinear.from_linear(torch.nn.Linear(64, 32, dtype=BF16), group_size=32)
    x = torch.randn(4, 64)
    y = layer(x)
    with computing_in(torch.nn.Sequential(layer), F32):
        assert layer.state_dict()["weight_scale"].dtype == BF16
        assert torch.equal(layer(x), y)


def test_arguments_are_cast_in_depth_and_others_left():
    mask, ids = torch.zeros(2, dtype=BF16), torch.arange(2)
    cast = cast_floats({"a": [mask, (ids, 1.5)], "b": None}, F32)
    assert cast["a"][0].dtype == F32
    assert cast["a"][1][0] is ids
    assert cast["b"] is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma2", "qwen2"])
def test_a_walk_in_float32_sees_what_a_float32_model_sees(model_type):
    tokens = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))

    def hessians(model, compute):
        seen = []

        def on_block(block):
            groups = block.groups()
            K = [block.module.get_submodule(g[0]).weight for g in groups]
            sizes = iter([w.shape[0] if model_type == "gpt2" else w.shape[1] for w in K])
            seen.extend(
                s.H
                for s in block.collect(groups, lambda g: HessianStatistic(next(sizes), tokens=64))
            )

        walk(model, tokens, on_block, compute=compute)
        return seen

    model = tiny(model_type, dtype=BF16, seed=0, std=0.2)
    exact = hessians(tiny(model_type, dtype=BF16, seed=0, std=0.2).float(), "auto")
    near, own = hessians(model, "float32"), hessians(model, "bfloat16")
    for best, other, spec in zip(near, own, exact, strict=True):
        assert relative_error(best, spec.double()) < 5e-3
        assert relative_error(best, spec.double()) <= relative_error(other, spec.double())
    assert {p.dtype for p in model.parameters()} == {BF16}


@pytest.mark.parametrize("method", ["gptq", "rtn", "nf4"])
def test_scales_are_in_the_dtype_of_the_model_whatever_is_computed_in(method):
    model = tiny("llama", dtype=BF16, seed=0)
    options = {} if method != "gptq" else {"compute_dtype": "float32", "samples": 2, "seq_len": 16}
    data = {"calibration": torch.randint(0, 96, (4, 16))} if options else {}
    report = llmkern.quantize(model, method, **options, **data)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} <= {BF16, F32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == BF16
    if options:
        assert any("computed in float32" in note for note in report.notes)


def test_evaluation_says_what_it_computed_in(monkeypatch):
    monkeypatch.setattr(compute, "_is_native", lambda dtype: False)
    model = tiny("llama", dtype=BF16, seed=0, std=0.2)
    tokens = torch.randint(0, 96, (2, 16))
    result = llmkern.evaluate(model, tokens, speed=False)
    assert result.compute_dtype == "float32"
    exact = llmkern.evaluate(model.float(), tokens, speed=False)
    assert result.perplexity == pytest.approx(exact.perplexity, rel=1e-4)


def test_evaluation_in_the_models_dtype_where_memory_is_short(monkeypatch):
    import psutil

    monkeypatch.setattr(compute, "_is_native", lambda dtype: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    model = tiny("llama", dtype=BF16, seed=0)
    result = llmkern.evaluate(model, torch.randint(0, 96, (2, 16)), speed=False)
    assert result.compute_dtype == "bfloat16"


def test_a_teacher_of_16_bits_is_read_in_float32_and_left_as_it_was(monkeypatch):
    monkeypatch.setattr(compute, "_is_native", lambda dtype: False)
    teacher, student = tiny("llama", dtype=BF16, seed=0), tiny("llama", dtype=BF16, seed=1)
    seen = set()
    teacher.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.add(next(module.parameters()).dtype)
    )
    tokens = torch.randint(0, 96, (4, 16))
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    report = llmkern.distill(student, teacher, data=tokens, steps=1, batch_size=2)
    assert seen == {F32}
    assert any("the teacher is computed in float32" in note for note in report.notes)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert {p.dtype for p in student.parameters()} == {BF16}
