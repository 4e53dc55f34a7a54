"""Recipes: what they read as, what they say of mistakes, and that Python and YAML mean the same."""

from __future__ import annotations

import pytest

from llmkern import LutFormat, QuantFormat
from llmkern.pipeline import (
    Distill,
    Prune,
    Quantize,
    default_recipe,
    dump_recipe,
    load_recipe,
    parse_recipe,
)

TEXT = """\
# A comment.
- prune:    {method: glu, ratio: 0.25, importance: obs}
- quantize: {method: gptq, bits: 4, group_size: 128}
- distill:  {method: soft, student: {layers: 0.5}, temperature: 2.0, steps: 500, lr: 1e-3}
"""


def test_recipe_is_what_python_says(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT)
    assert load_recipe(tmp_path / "recipe.yaml") == [
        Prune("glu", ratio=0.25, importance="obs"),
        Quantize("gptq", bits=4, group_size=128),
        Distill("soft", student={"layers": 0.5}, temperature=2.0, steps=500, lr=1e-3),
    ]


@pytest.mark.parametrize(
    "stage",
    [
        Prune("sparsegpt", pattern=(2, 4), act_order=True, samples=16, calibration="some/file.txt"),
        Prune("wanda", sparsity=0.5, rules={"*.down_proj": None, "*.q_proj": 0.25, "*.k_proj": "2:4"}),
        Prune("magnitude", sparsity=0.5),
        Prune("depth", blocks=2, criterion="perplexity"),
        Prune("taylor", target_params=1_000_000, seed=3),
        Quantize(bits=3, group_size=None, rules={"*.o_proj": QuantFormat(4, 64), "*.q_proj": None}),
        Quantize("nf4", group_size=64, rules={"*.o_proj": LutFormat("nf4", 128)}),
        Quantize("rtn", clip_search=True, group_size="auto"),
        Distill("sequence", prompts=["a", "b"], answers="kept.jsonl", max_new_tokens=5),
        Distill("hidden", student="current", hidden_weight=0.5, lr=1e-5, clip=None),
        Distill(student={"layers": [0, 2], "width": 0.75}, teacher="original", data=["a.txt", "b.txt"]),
    ],
    ids=lambda stage: stage.label,
)  # fmt: skip
def test_round_trip(stage):
    text = dump_recipe([stage])
    assert parse_recipe(text) == [stage]
    assert text.startswith(f"- {stage.name}:")


def test_default_recipe_is_prune_quantize_distill():
    stages = default_recipe()
    assert [stage.name for stage in stages] == ["prune", "quantize", "distill"]
    labels = [stage.label for stage in stages]
    assert labels[:2] == ["prune glu 25 %", "quantize gptq 4 bits"]
    assert labels[2] == "distill soft into 50 % of blocks"


def test_numbers_are_those_of_yaml_1_2():
    text = "- prune: {pattern: 2:4, damp: 1e-2, samples: '16', seed: 010, act_order: false}"
    (stage,) = parse_recipe(text)
    options = {"pattern": "2:4", "damp": 0.01, "samples": 16, "seed": 10, "act_order": False}
    assert stage.options == options
    assert type(stage.options["samples"]) is int


BAD = {
    "": "r.yaml:1: got no list of stages",
    "prune: {method: glu}": "r.yaml:1: got no list of stages",
    "- prune": "r.yaml:1: got 'prune', expected one stage",
    "- prune:": "r.yaml:1: prune: got nothing, expected its options",
    "- prune: 0.25": "r.yaml:1: prune: got '0.25', expected its options",
    "- {prune: {method: glu}, quantize: {}}": "r.yaml:1: got 2 keys, expected one stage",
    "\n- prun: {method: glu}": "r.yaml:2: prun: unknown stage, did you mean prune?",
    "- quantize: {bits: 4}\n- quantize:\n    bits: 4\n    group_sise: 64": (
        "r.yaml:4: quantize: group_sise: unknown, did you mean group_size?"
    ),
    "- prune: {method: glue, ratio: 0.2}": (
        "r.yaml:1: prune: method: got 'glue', did you mean glu?"
    ),
    "- prune:\n    method: glu": (
        "r.yaml:1: prune: ratio, target_params: got none of them, expected exactly one"
    ),
    "- prune:\n    method: wanda": (
        "r.yaml:1: prune: sparsity, pattern: got none of them, expected one"
    ),
    "- prune:\n    method: depth\n    ratio: 0.5\n    blocks: 1": (
        "r.yaml:3: prune: ratio, target_params, blocks: got ratio and blocks, expected exactly one"
    ),
    "- prune:\n    method: glu\n    ratio: 1.5": "r.yaml:3: prune: ratio: got 1.5, expected a fraction",
    "- prune:\n    method: glu\n    ratio: much": "r.yaml:3: prune: ratio: got 'much', expected a number",
    "- prune: {method: glu, ratio: .nan}": "r.yaml:1: prune: ratio: got '.nan', expected a number",
    "- prune: {method: glu, ratio: 0.2, rules: {'*': 0.5}}": "r.yaml:1: prune: rules: unknown",
    "- prune: {pattern: 9:10}": "r.yaml:1: prune: pattern: got '9:10', expected n kept of m",
    "- prune: {sparsity: 0.5, rules: {'*q*': 2}}": "r.yaml:1: prune: rules['*q*']: got 2, expected a",
    "- prune: {method: magnitude, sparsity: 0.5,\n           samples: 4}": (
        "r.yaml:2: prune: samples: got 4, expected nothing: prune magnitude reads no calibration data"
    ),
    "- prune: {method: wanda, pattern: 2:4, allocation: owl}": (
        "r.yaml:1: prune: allocation: got 'owl' with a pattern"
    ),
    "- quantize: {bits: four}": "r.yaml:1: quantize: bits: got 'four', expected an integer",
    "- quantize: {bits: 4.5}": "r.yaml:1: quantize: bits: got 4.5, expected an integer",
    "- quantize: {bits: 5}": "r.yaml:1: quantize: bits: got 5, expected one of",
    "- quantize: {bits: true}": "r.yaml:1: quantize: bits: got True, expected an integer",
    "- quantize: {group_size: big}": (
        "r.yaml:1: quantize: group_size: got 'big', expected an integer or 'auto' or null"
    ),
    "- quantize: {group_size: 0}": "r.yaml:1: quantize: group_size: got 0, expected a positive number",
    "- quantize: {symmetric: yes}": "r.yaml:1: quantize: symmetric: got 'yes', expected true or false",
    "- quantize: {damp: 2}": "r.yaml:1: quantize: damp: got 2.0, expected a fraction",
    "- quantize: {method: nf4, bits: 3}": "r.yaml:1: quantize: bits: got 3, expected 4 for method 'nf4'",
    "- quantize:\n    method: rtn\n    samples: 4": (
        "r.yaml:3: quantize: samples: got 4, expected nothing: quantize rtn reads no calibration data"
    ),
    "- quantize: {rules: {'*q*': 4}}": "r.yaml:1: quantize: rules['*q*']: got 4, expected a mapping",
    "- quantize: {rules: {'*q*': {bit: 4}}}": (
        "r.yaml:1: quantize: rules['*q*']: bit: unknown, did you mean bits?"
    ),
    "- quantize: {rules: {'*q*': {bits: 7}}}": "r.yaml:1: quantize: rules['*q*']: bits: got 7",
    "- quantize: {bits: 4, bits: 3}": "r.yaml:1: quantize: bits: given before, in line 1",
    "- quantize: {checkpoint: here}": "r.yaml:1: quantize: checkpoint: unknown",
    "- distill:\n    steps: 0": "r.yaml:2: distill: steps: got 0, expected at least 1",
    "- distill: {lr: fast}": "r.yaml:1: distill: lr: got 'fast', expected a number",
    "- distill: {temperature: -1}": "r.yaml:1: distill: temperature: got -1.0, expected a positive",
    "- distill: {resume: true}": "r.yaml:1: distill: resume: unknown",
    "- distill:\n    student:\n      layer: 0.5": (
        "r.yaml:2: distill: student.layer: unknown, did you mean layers?"
    ),
    "- distill: {student: {layers: 1.5}}": "r.yaml:1: distill: student.layers: got 1.5, expected a",
    "- distill: {student: {layers: [2, 1]}}": "r.yaml:1: distill: student.layers: got [2, 1]",
    "- distill: {student: {width: 1.5}}": "r.yaml:1: distill: student.width: got 1.5, expected a",
    "- distill: {student: nowhere}": "r.yaml:1: distill: student: got 'nowhere', expected a model",
    "- distill: {student: current, teacher: current}": "r.yaml:1: distill: teacher: got 'current'",
    "- distill: {teacher: me}": "r.yaml:1: distill: teacher: got 'me', expected 'current' or 'original'",
    "- distill: {method: sequence}": "r.yaml:1: distill: prompts, answers: got neither",
    "- distill: {method: sequence, answers: a.jsonl, samples: 3}": "r.yaml:1: distill: samples: unknown",
    "- distill: [soft]": "r.yaml:1: distill: got a list, expected its options",
    "- distill:\n    self: 1": "r.yaml:2: distill: self: unknown",
    "- prune: {method: [": "r.yaml:1: got no valid YAML",
    "- prune: \x00": "r.yaml: got no valid YAML",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=list(BAD.values()))
def test_mistakes_are_named_with_line_and_key(text):
    with pytest.raises(ValueError, match=r"^r\.yaml:") as caught:
        parse_recipe(text, "r.yaml")
    assert str(caught.value).startswith(BAD[text])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe: got '.*no\.yaml', expected a YAML file \(No such"
    ):
        load_recipe(tmp_path / "no.yaml")


def test_python_says_the_same_of_mistakes():
    with pytest.raises(ValueError, match=r"^group_sise: unknown, did you mean group_size\?$"):
        Quantize(group_sise=3)
    with pytest.raises(AttributeError, match="a stage cannot be changed"):
        Quantize().method = "rtn"


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        (Prune("sparsegpt", sparsity=0.5), True),
        (Prune("wanda", sparsity=0.5), True),
        (Prune("magnitude", sparsity=0.5), False),
        (Prune("magnitude", sparsity=0.5, bias_compensation=True), True),
        (Prune("magnitude", sparsity=0.5, allocation="owl"), True),
        (Prune("glu", ratio=0.5), True),
        (Prune("glu", ratio=0.5, importance="magnitude", compensate=False), False),
        (Prune("depth", blocks=1), True),
        (Prune("taylor", ratio=0.5), True),
        (Quantize(), True),
        (Quantize("rtn"), False),
        (Distill(), True),
        (Distill("sequence", answers="pairs.jsonl"), False),
        (Distill("gkd", prompts="prompts.txt"), True),
        (Distill("gkd", prompts="prompts.txt", on_policy=1), False),
        (Distill("minillm", prompts="prompts.txt"), True),
        (Distill("minillm", prompts="prompts.txt", lm_weight=0), False),
        (Distill("minillm", lm_weight=0), True),
        (Distill("sequence", answers="pairs.jsonl", student={"width": 0.5}), True),
    ],
    ids=lambda value: repr(value),
)
def test_stages_know_whether_they_need_data(stage, needed):
    assert stage.needs_calibration is needed
