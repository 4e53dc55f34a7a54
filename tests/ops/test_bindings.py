"""The compiled modules' functions: the fields of csrc/llmkern.h's structs as keyword arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from llmkern._backends import compiled_module
from llmkern._dtypes import FLOAT_NAMES
from llmkern.ops._library import LAYOUTS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MODULES = [module for name in ("_cpu", "_cuda") if (module := compiled_module(name)[0])]
# An address of no tensor: these calls are refused before anything is launched.
CALL = {"H": 0, "x": 0, "T": 0, "K": 0, "alpha": 1.0, "dtype": "float32", "E": 1, "offsets": 0}


@pytest.fixture(scope="module")
def cpu():
    return compiled_module("_cpu")[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_names_of_dtypes_and_layouts_are_those_of_python(module):
    assert tuple(FLOAT_NAMES.values()) == module.DTYPES
    assert LAYOUTS == module.LAYOUTS


def declared(body: str) -> list[str]:
    """Names of a struct's fields, in order."""
    plain = re.sub(r"//.*|=[^;,]*", "", body)
    return [name for line in plain.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line)]


@pytest.mark.parametrize("header", ["llmkern.h", "cuda/kernels.h"])
def test_fields_are_named_in_the_order_of_the_struct(header):
    text = (CSRC / header).read_text()
    structs = dict(re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.S | re.M))
    named = dict(re.findall(r"^LLMKERN_FIELDS\((\w+),(.*?)\)", text, re.S | re.M))
    assert structs
    assert {name: re.findall(r"\w+", names) for name, names in named.items()} == {
        name: declared(body) for name, body in structs.items()
    }


def test_a_function_knows_its_signature(cpu):
    assert list(inspect.signature(cpu.hessian_update).parameters) == list(CALL)
    kinds = {p.kind for p in inspect.signature(cpu.w4a16_gemm).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({k: v for k, v in CALL.items() if k != "E"}, TypeError, "got 7 arguments, .*offsets"),
        ({**CALL, "more": 1}, TypeError, "got 9 arguments"),
        ({"rows" if k == "T" else k: v for k, v in CALL.items()}, TypeError, "argument rows"),
        ({**CALL, "dtype": "float64"}, ValueError, "float64, expected one of float32, bfloat16"),
        ({**CALL, "dtype": 0}, TypeError, "argument type"),
        ({**CALL, "T": 1.5}, TypeError, "float"),
        ({**CALL, "K": 1 << 64}, OverflowError, "too (big|large)"),
        ({**CALL, "alpha": "1"}, TypeError, "real number"),
    ],
    ids=["missing", "more", "unknown", "dtype", "dtype_type", "float", "overflow", "text"],
)
def test_wrong_arguments_are_refused(cpu, call, error, message):
    with pytest.raises(error, match=message):
        cpu.hessian_update(**call)


def test_arguments_have_names(cpu):
    with pytest.raises(TypeError, match="named"):
        cpu.hessian_update(*CALL.values())


def test_a_number_that_its_field_cannot_hold_is_refused(cpu):
    call = dict.fromkeys(inspect.signature(cpu.obs_quantize).parameters, 0)
    with pytest.raises(ValueError, match="4294967300, which its field cannot hold"):
        cpu.obs_quantize(**{**call, "scales_dtype": "float32", "bits": (1 << 32) + 4})


def test_any_order_and_names_that_are_not_interned(cpu):
    """K = 0: nothing is done."""
    cpu.hessian_update(**dict(reversed(CALL.items())))
    cpu.hessian_update(**{"".join(list(name)): value for name, value in CALL.items()})
