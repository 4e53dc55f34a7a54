"""The inline assembly that unpacks integers, run instruction by instruction: Triton's interpreter cannot.

That ptxas takes it, and that kernels use it, is in test_aot.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from llmkern.triton_kernels import int4

CODES = 8
BIAS = {
    torch.bfloat16: 0xC300,
    torch.float16: 0xE400,
}  # of integer_tile: -(2^7 + zero), -(2^10 + zero)
ASM = {torch.bfloat16: int4._UNPACK_BF16.value, torch.float16: int4._UNPACK_F16.value}


def permute_bytes(a: int, b: int, selector: int) -> int:
    """prmt.b32: byte i of the result is byte (selector >> 4 i) & 7 of b:a."""
    octets = (b << 32 | a).to_bytes(8, "little")
    chosen = [selector >> (4 * i) & 15 for i in range(4)]
    assert max(chosen) < 8, "bit 3 would replicate the sign"
    return int.from_bytes(bytes(octets[i] for i in chosen), "little")


def combine(a: int, b: int, c: int, table: int) -> int:
    """lop3.b32: bit by bit, the entry a:b:c of the truth table."""
    return sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
        for i in range(32)
    )


def halves(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype)


def multiply_add(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    """fma.rn on two halves: exact in float64, then one rounding."""
    x, y, z = (halves(bits, dtype).double() for bits in (a, b, c))
    low, high = ((x * y + z).to(dtype).view(torch.int16).int() & 0xFFFF).tolist()
    return low | high << 16


def run(asm: str, word: int, bias: int, dtype: torch.dtype) -> torch.Tensor:
    """The eight values that `asm` makes of a word."""
    registers = {"$8": word, "$9": bias}
    values = [0] * CODES

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 16)

    for line in filter(None, (part.strip() for part in re.split(r"[;\n]", asm))):
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        name, _, rest = line.lstrip("{ ").partition(" ")
        target, *operands = [part.strip() for part in re.sub(r"[{}]", "", rest).split(",")]
        kind = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
        if name == "mov.b32" and target.startswith("$"):
            low, high = int(target[1:]), int(operands[0][1:])
            value = read(operands[1])
            values[low], values[high] = value & 0xFFFF, value >> 16
        elif name == "mov.b32":
            registers[target] = read(operands[0])
        elif name == "shr.u32":
            registers[target] = read(operands[0]) >> int(operands[1])
        elif name == "prmt.b32":
            registers[target] = permute_bytes(*map(read, operands))
        elif name == "lop3.b32":
            registers[target] = combine(*map(read, operands))
        elif name == f"fma.rn.{kind}":
            registers[target] = multiply_add(*map(read, operands), dtype)
        else:
            raise AssertionError(f"no meaning is given to {line!r}")
    bits = torch.tensor(values, dtype=torch.int32)
    return bits.to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", ASM, ids=lambda d: str(d).removeprefix("torch."))
def test_every_code_in_every_place_minus_every_zero(dtype: torch.dtype) -> None:
    for code in range(16):
        word = sum(((code + 5 * place) % 16) << (4 * place) for place in range(CODES))
        codes = torch.tensor([(code + 5 * place) % 16 for place in range(CODES)])
        for zero in range(16):
            bias = (zero | BIAS[dtype]) * 0x10001
            assert torch.equal(run(ASM[dtype], word, bias, dtype), (codes - zero).to(dtype))


@pytest.mark.parametrize("dtype", ASM, ids=lambda d: str(d).removeprefix("torch."))
def test_a_wrong_constant_is_seen(dtype: torch.dtype) -> None:
    word, bias = 0x76543210, (8 | BIAS[dtype]) * 0x10001
    right = run(ASM[dtype], word, bias, dtype)
    changes = (("0xea", "0xe8"), ("0x5511", "0x5151"), ("0x000f000f", "0x000f00ff"))
    changes += (
        ("0x4300", "0x4380"),
        ("0x6400", "0x6800"),
        ("word, 4", "word, 8"),
        ("$8, 4", "$8, 8"),
    )
    seen = 0
    for old, new in changes:
        if old in ASM[dtype]:
            seen += not torch.equal(run(ASM[dtype].replace(old, new), word, bias, dtype), right)
    assert seen == 5


def test_the_bias_is_the_one_that_the_kernels_pass() -> None:
    source = int4.integer_tile.fn if hasattr(int4.integer_tile, "fn") else int4.integer_tile
    import inspect

    text = inspect.getsource(source)
    assert all(f"0x{bias:X}" in text for bias in BIAS.values())
