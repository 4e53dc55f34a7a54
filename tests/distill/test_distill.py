"""Distillation of tiny models: the right losses, a student that gains from its teacher, bad input."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import llmkern
from llmkern.distill import distill, make_student
from llmkern.distill._distiller import Distiller
from llmkern.distill.hidden import HiddenOptions
from llmkern.distill.soft import SoftOptions
from llmkern.reference.kd_loss import kd_loss as plain


def llama(**changes):
    sizes = {"intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 61}
    return tiny_models.tiny(seed=0, **sizes | changes).train()


def tokens(rows: int = 12, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("capped", [False, True], ids=["plain_head", "head_with_bias"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_losses_are_those_of_the_formula(capped, divergence):
    teacher, student = llama(), llama(num_hidden_layers=2)
    if capped:
        student.lm_head = nn.Linear(64, 61)
    options = SoftOptions(alpha=0.3, temperature=1.5, divergence=divergence, beta=0.2)
    module = Distiller(student, teacher.eval(), options)
    batch = {"input_ids": tokens()}
    got = module(batch, num_items=float(12 * 8))
    with torch.no_grad():
        theirs = teacher(tokens()).logits[:, :-1].flatten(0, 1)
    mine = student(tokens()).logits[:, :-1].flatten(0, 1)
    labels = tokens()[:, 1:].flatten()
    want = plain(mine, theirs, labels, alpha=0.3, temperature=1.5, divergence=divergence, beta=0.2)
    for name, value in zip(("loss", "ce", "kd"), want, strict=True):
        torch.testing.assert_close(got[name], value)
    got["loss"].backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    want[0].backward()
    for a, p in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_hidden_states_and_maps_are_compared_layer_by_layer():
    teacher, student = llama(attn_implementation="eager"), None
    teacher.config._attn_implementation = "eager"
    student = copy.deepcopy(teacher)
    options = HiddenOptions(alpha=0.0, hidden_weight=2.0, attention_weight=3.0)
    module = Distiller(student, teacher, options)
    same = module({"input_ids": tokens()}, 96.0)
    assert same["hidden"] == 0
    assert same["attention"] == 0
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(3)
    got = module({"input_ids": tokens()}, 96.0)
    a = student.model(tokens(), output_hidden_states=True, output_attentions=True)
    b = teacher.model(tokens(), output_hidden_states=True, output_attentions=True)
    wanted = [
        (x - y).square().mean() / y.square().mean()
        for x, y in zip(a.hidden_states[1:], b.hidden_states[1:], strict=True)
    ]
    torch.testing.assert_close(got["hidden"], torch.stack(wanted).mean())
    maps = [
        (x - y).square().sum(-1).mean() for x, y in zip(a.attentions, b.attentions, strict=True)
    ]
    torch.testing.assert_close(got["attention"], torch.stack(maps).mean())
    total = got["ce"] + 2 * got["hidden"] + 3 * got["attention"]
    torch.testing.assert_close(got["loss"], total)


def test_narrower_student_learns_projections():
    teacher, student = llama(), llama(hidden_size=32, num_hidden_layers=2)
    options = {"hidden_weight": 5.0, "lr": 0.01, "batch_size": 4, "steps": 40}
    report = distill(student, teacher, "hidden", data=tokens(), **options)
    hidden = [step.metrics["hidden"] for step in report.training.steps]
    assert sum(hidden[-5:]) < 0.7 * sum(hidden[:5])


def test_student_comes_closer_to_its_teacher_and_keeps_dtype_and_mode():
    teacher = llama().train()
    llmkern.patch(teacher, llmkern.QuantFormat(4, 32))
    student = make_student(teacher, 0.5).bfloat16().eval()
    assert student.config.num_hidden_layers == 2
    assert not hasattr(student.config, "quantization_config")
    report = distill(student, teacher, data=tokens(), steps=30, lr=0.01, batch_size=4, alpha=1.0)
    kd = [step.metrics["kd"] for step in report.training.steps]
    assert sum(kd[-5:]) < 0.5 * sum(kd[:5])
    assert student.dtype == torch.bfloat16
    assert not student.training
    assert teacher.training
    assert report.to_dict()["options"]["alpha"] == 1.0


def test_each_parameter_and_buffer_keeps_its_own_dtype():
    student = llama(num_hidden_layers=2).to(torch.bfloat16)
    precise = torch.tensor([0.501, 0.5017, 0.5003, 0.5011])  # one number in bfloat16
    student.model.layers[0].mlp.register_parameter("correction", nn.Parameter(precise.clone()))
    student.model.layers[1].mlp.register_buffer("frequencies", precise.clone())
    before = {n: t.dtype for n, t in (*student.named_parameters(), *student.named_buffers())}
    distill(student, llama(), data=tokens(), steps=2, lr=1e-6, batch_size=2)
    after = {n: t.dtype for n, t in (*student.named_parameters(), *student.named_buffers())}
    assert after == before
    assert len(set(before.values())) == 2
    torch.testing.assert_close(student.model.layers[0].mlp.correction.data, precise)
    assert torch.equal(student.model.layers[1].mlp.frequencies, precise)


def test_student_loads_anywhere(tmp_path):
    student = make_student(llama(), [0, 3])
    teacher = llama()
    for mine, theirs in ((0, 0), (1, 3)):
        a, b = student.model.layers[mine], teacher.model.layers[theirs]
        assert torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


@pytest.mark.parametrize("data", [None, tokens()], ids=["magnitude", "obs"])
def test_narrow_students_keep_neurons_of_the_teacher(data, tmp_path):
    teacher = llama(intermediate_size=128)
    student = make_student(teacher, 0.5, width=0.5, calibration=data)
    assert teacher.config.intermediate_size == 128
    assert student.config.num_hidden_layers == 2
    assert student.config.intermediate_size == 64
    gate = teacher.model.layers[0].mlp.gate_proj.weight
    kept = student.model.layers[0].mlp.gate_proj.weight
    assert len(kept) == 64
    assert all((gate == row).all(1).any() for row in kept)
    down = teacher.model.layers[0].mlp.down_proj.weight
    columns = [
        (down == c[:, None]).all(0).any() for c in student.model.layers[0].mlp.down_proj.weight.t()
    ]
    assert all(columns) == (data is None)  # adjusted where there is data
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    report = distill(student, teacher, data=tokens(), steps=2, batch_size=2)
    assert len(report.training.steps) == 2


def test_gpt2_distills_too():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=61, n_positions=32)
    teacher = GPT2LMHeadModel(config).eval()
    report = distill(make_student(teacher, 2), teacher, data=tokens(), steps=3, batch_size=2)
    assert len(report.training.steps) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_zeros_of_a_pruned_student_stay_zero(optimizer):
    teacher, student = llama(), llama()
    llmkern.prune(student, "magnitude", pattern="2:4")
    zeros = {n: p == 0 for n, p in student.named_parameters() if "proj" in n}
    options = {"optimizer": optimizer, "weight_decay": 0.1, "steps": 4, "batch_size": 2}
    distill(student, teacher, data=tokens(), **options)
    for name, mask in zeros.items():
        weight = student.get_parameter(name)
        assert int(mask.sum()) == mask.numel() // 2
        assert torch.equal(weight == 0, mask)
    distill(student, teacher, data=tokens(), keep_zeros=False, **options)
    assert any((student.get_parameter(n)[mask] != 0).any() for n, mask in zeros.items())


class Words:
    """As much of a tokenizer as is compared."""

    def __init__(self, *words: str) -> None:
        self._words = {word: i for i, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return self._words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "soft-labels"}, "method: got 'soft-labels', expected one of soft, hidden"),
        ({"hidden_weight": 1.0}, "hidden_weight: not an option of method 'soft', expected"),
        ({"alpha": -1.0}, r"alpha: got -1.0, expected a weight in \[0, 1\]"),
        ({"divergence": "tv"}, "divergence: got 'tv', expected one of"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"method": "hidden", "layers": ("3-1",)}, "layers: got '3-1', expected STUDENT:TEACHER"),
        ({"method": "hidden", "layers": ("3:1",)}, "layers: got '3:1', expected blocks 1 to 2"),
        ({"method": "hidden", "attention_weight": 1.0}, "'sdpa' attention in the student"),
        (
            {"tokenizer": Words("a", "b"), "teacher_tokenizer": Words("b", "a")},
            "tokenizer: got another vocabulary than the teacher's",
        ),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_bad_arguments_are_named_and_nothing_is_trained(arguments, message):
    student = llama(num_hidden_layers=2)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        distill(student, llama(), data=tokens(), **arguments)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_students_that_cannot_be_trained_are_refused():
    with pytest.raises(
        ValueError, match="student: got a vocabulary of 59, expected the teacher's, 61"
    ):
        distill(llama(vocab_size=59), llama(), data=tokens().clamp(max=50))
    packed = llama()
    llmkern.patch(packed, llmkern.QuantFormat(4, 32))
    with pytest.raises(ValueError, match="student: got packed layers in it"):
        distill(packed, llama(), data=tokens())


@pytest.mark.parametrize("layers", [0, 5, 0.0, 1.5, [], [1, 0], [4]])
def test_student_depths_out_of_range_are_refused(layers):
    with pytest.raises(ValueError, match="layers: got"):
        make_student(llama(), layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0.0}, r"width: got 0.0, expected a fraction in \(0, 1\]"),
        ({"width": 1.1}, "width: got 1.1"),
        ({"importance": "obs"}, "importance: got it with width = 1, expected a width below 1"),
        ({"width": 0.5, "importance": "best"}, "importance: got 'best', expected one of"),
    ],
)
def test_student_widths_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(llama(), **arguments)
