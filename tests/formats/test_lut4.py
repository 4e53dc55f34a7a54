"""Books, block-wise codes, the CPU layout, and the files of bitsandbytes and SqueezeLLM."""

import json
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from llmkern.formats.int4 import pack_codes, unpack_codes
from llmkern.formats.lut4 import (
    CODEBOOKS,
    FP4_CODEBOOK,
    NF4_CODEBOOK,
    block_scales,
    codebook_name,
    group_scales,
    group_size_of,
    quantize_blockwise,
)
from llmkern.formats.lut4_cpu import from_cpu_layout, to_cpu_layout
from llmkern.formats.squeezellm import from_squeezellm
from llmkern.reference.lut4_gemm import dequantize_lut4

# bitsandbytes 0.50.2, quantize_4bit(CUBES, blocksize=64): the packed bytes, and the nested statistics.
CUBES = torch.arange(-64, 64).float().view(2, 64) ** 3
PACKED = {
    "nf4": "0000111111222223333344444555555666666666667777777777777777777777"
    "77777777777777777777778888888888999999aaaabbbbbccccddddeeeeeffff",
    "fp4": "bbbbaaaaaaaddddddcccccfffffeeeeeeeee9999999999999999999900000000"
    "0888888881111111111111111111666666666677774444445555522222223333",
}
ABSMAX = [262144.0, 250047.0]
NESTED = {
    "absmax": [255, 0],
    "scale": 6048.5,
    "offset": 256095.5,
    "map": {255: 1.0, 0: -0.992968738079071},
}


def packed_bytes(kind):
    return torch.tensor(list(bytes.fromhex(PACKED[kind])), dtype=torch.uint8)[:, None]


def state_bytes(**state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def bitsandbytes_layer(kind, nested=False):
    """The tensors that bitsandbytes writes for CUBES."""
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
    tensors = {
        "weight": packed_bytes(kind),
        "weight.absmax": torch.tensor(ABSMAX),
        "weight.quant_map": CODEBOOKS[kind].clone(),
    }
    if nested:
        book = torch.zeros(256)
        for code, value in NESTED["map"].items():
            book[code] = value
        tensors["weight.absmax"] = torch.tensor(NESTED["absmax"], dtype=torch.uint8)
        tensors["weight.nested_absmax"] = torch.tensor([NESTED["scale"]])
        tensors["weight.nested_quant_map"] = book
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": NESTED["offset"],
        }
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = state_bytes(**state)
    return tensors


def test_nf4_is_the_quantiles_of_the_normal_distribution():
    tail = NormalDist().inv_cdf
    upper = [tail(0.9677083 + (0.5 - 0.9677083) * i / 8) for i in range(8)]
    lower = [-tail(0.9677083 + (0.5 - 0.9677083) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*upper, 0.0, *lower]))
    torch.testing.assert_close(NF4_CODEBOOK, values / values.max(), rtol=0, atol=1e-6)


def test_books_have_the_published_bits():
    assert float(NF4_CODEBOOK[1]).hex() == "-0x1.6473620000000p-1"
    assert float(NF4_CODEBOOK[14]).hex() == "0x1.7227660000000p-1"
    assert float(FP4_CODEBOOK[1]).hex() == "0x1.5555560000000p-8"
    assert (FP4_CODEBOOK[:8] * 12).tolist() == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(FP4_CODEBOOK[8:], -FP4_CODEBOOK[:8])
    assert codebook_name(NF4_CODEBOOK) == "nf4"
    assert codebook_name(FP4_CODEBOOK.nextafter(torch.ones(16))) is None


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codes_are_those_of_bitsandbytes(kind):
    codes, absmax = quantize_blockwise(CUBES, CODEBOOKS[kind], 64)
    theirs = torch.stack((packed_bytes(kind) >> 4, packed_bytes(kind) & 15), 1).view(2, 64)
    assert absmax.tolist() == ABSMAX
    # Its two FP4 zeros are one value.
    assert torch.equal(CODEBOOKS[kind][codes.int()], CODEBOOKS[kind][theirs.int()])
    if kind == "nf4":
        assert torch.equal(codes, theirs)


def test_a_tie_goes_to_the_smaller_value():
    book = torch.linspace(-1, 1, 17)[:16]
    w = torch.cat(((book[:-1] + book[1:]) / 2, torch.tensor([-1.0])))[None]
    codes, _ = quantize_blockwise(w, book.flip(0), 16)
    assert codes[0, :15].tolist() == [15 - i for i in range(15)]


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 5),
    K=st.sampled_from([32, 96, 64, 160]),
    block=st.sampled_from([32, 64, 128]),
    kind=st.sampled_from(sorted(CODEBOOKS)),
)
def test_every_code_is_the_nearest(N, K, block, kind):
    w = torch.randn(N, K)
    w[0, :32] = 0
    codes, absmax = quantize_blockwise(w, CODEBOOKS[kind], block)
    scales = group_scales(absmax, block, (N, K))
    size = group_size_of(block, K)
    errors = (
        w.view(N, -1, size, 1) - scales[..., None, None] * CODEBOOKS[kind]
    ).abs()  # [N, groups, size, 16]
    taken = errors.gather(3, codes.view(N, -1, size, 1).long())[..., 0]
    assert (taken <= errors.amin(3) + 1e-6).all()
    assert torch.equal(block_scales(scales, block, (N, K)), absmax)


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 9), units=st.integers(0, 6), seed=st.integers(0, 99))
def test_cpu_layout_and_back(N, units, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, 32 * units), dtype=torch.uint8, generator=generator)
    qweight = pack_codes(codes, 4) if units else torch.empty(N, 0, dtype=torch.int32)
    packed = to_cpu_layout(qweight)
    units_of = codes.view(N, units, 2, 16)
    picture = units_of[:, :, 0] | units_of[:, :, 1] << 4
    assert torch.equal(packed, picture.view(N, 16 * units))
    assert torch.equal(from_cpu_layout(packed), qweight)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_bitsandbytes_round_trip(kind):
    tensors = bitsandbytes_layer(kind)
    weight = from_bitsandbytes({**tensors, "bias": torch.zeros(2)})
    assert (weight.group_size, weight.block_size, weight.dtype) == (64, 64, torch.float32)
    theirs = torch.stack((packed_bytes(kind) >> 4, packed_bytes(kind) & 15), 1).view(2, 64)
    assert torch.equal(unpack_codes(weight.qweight, 4, 64), theirs)
    written = to_bitsandbytes(weight)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_nested_scales_are_decoded():
    weight = from_bitsandbytes(bitsandbytes_layer("nf4", nested=True))
    book, scale, offset = NESTED["map"], NESTED["scale"], NESTED["offset"]
    want = [book[code] * scale + offset for code in NESTED["absmax"]]
    torch.testing.assert_close(weight.scales.view(-1), torch.tensor(want), rtol=1e-7, atol=0)


def test_blocks_that_cross_rows_become_smaller_groups():
    w = torch.randn(3, 96)
    codes, absmax = quantize_blockwise(w, NF4_CODEBOOK, 64)  # 4.5 blocks
    packed = (codes.view(-1)[::2] << 4 | codes.view(-1)[1::2])[:, None]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 96]}
    tensors = {
        "weight": packed,
        "weight.absmax": absmax,
        "weight.quant_map": NF4_CODEBOOK,
        "weight.quant_state.bitsandbytes__nf4": state_bytes(**state),
    }
    weight = from_bitsandbytes(tensors)
    assert weight.group_size == 32
    flat = NF4_CODEBOOK[codes.int()].view(-1) * absmax.repeat_interleave(64)[: 3 * 96]
    assert torch.equal(dequantize_lut4(*weight[:4], torch.float32), flat.view(3, 96))
    for name, tensor in to_bitsandbytes(weight).items():
        assert torch.equal(tensor, tensors[name]), name


def test_squeezellm_has_a_book_per_row():
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    book = torch.randn(5, 16)
    weight = from_squeezellm(
        {"qweight": pack_codes(codes, 4).t().contiguous(), "lookup_table": book}
    )
    assert torch.equal(dequantize_lut4(*weight[:4], torch.float32), book.gather(1, codes.long()))


def layer(**change):
    tensors = bitsandbytes_layer("nf4") | change
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


STATE = "weight.quant_state.bitsandbytes__nf4"
NF4_WEIGHT = from_bitsandbytes(bitsandbytes_layer("nf4"))
PACKED_8 = packed_bytes("nf4")[:8]
ROW_BOOKS = NF4_WEIGHT._replace(codebook=torch.zeros(2, 16))
SQUEEZE = {"qweight": torch.zeros(8, 4, dtype=torch.int32), "lookup_table": torch.zeros(4, 16)}
ERRORS = {
    "nan": (
        lambda: quantize_blockwise(torch.full((1, 32), float("nan")), NF4_CODEBOOK),
        "w: got NaN",
    ),
    "vector": (lambda: quantize_blockwise(torch.zeros(32), NF4_CODEBOOK), "w: got"),
    "block": (lambda: quantize_blockwise(CUBES, NF4_CODEBOOK, 0), "block: got 0"),
    "book_of_15": (
        lambda: quantize_blockwise(CUBES, NF4_CODEBOOK[:15]),
        r"codebook: got float32 \[15\]",
    ),
    "book_per_row": (lambda: quantize_blockwise(CUBES, torch.zeros(2, 16)), "expected one book"),
    "rows_of_80": (lambda: group_size_of(64, 80), r"block: got 64 for rows of K = 80.*share 16"),
    "no_state": (lambda: from_bitsandbytes(layer(**{STATE: None})), "weight.quant_state.*neither"),
    "no_absmax": (
        lambda: from_bitsandbytes(layer(**{"weight.absmax": None})),
        "weight.absmax: got none",
    ),
    "short_absmax": (
        lambda: from_bitsandbytes(layer(**{"weight.absmax": torch.ones(1)})),
        "weight.absmax: got 1 entries, expected 2",
    ),
    "short_weight": (
        lambda: from_bitsandbytes(layer(weight=packed_bytes("nf4")[:8])),
        "weight: got 8 bytes",
    ),
    "state_without_shape": (
        lambda: from_bitsandbytes(layer(**{STATE: state_bytes(blocksize=64)})),
        "weight.quant_state: got",
    ),
    "nested_without_its_map": (
        lambda: from_bitsandbytes(layer(**{"weight.absmax": torch.zeros(2, dtype=torch.uint8)})),
        "weight.nested_quant_map: got none",
    ),
    "books_bitsandbytes_has_not": (lambda: to_bitsandbytes(ROW_BOOKS), "codebook, scales: got"),
    "scales_inside_a_block": (
        lambda: block_scales(torch.arange(3.0)[None], 64, (1, 96)),
        "scales: got",
    ),
    "sparse": (
        lambda: from_squeezellm({**SQUEEZE, "rows": torch.ones(5), "vals": torch.ones(1)}),
        "rows, vals: got outliers",
    ),
    "table_of_3_bits": (
        lambda: from_squeezellm({**SQUEEZE, "lookup_table": torch.zeros(4, 8)}),
        r"lookup_table: got torch.float32 \[4, 8\]",
    ),
    "cpu_layout_of_int8": (
        lambda: to_cpu_layout(torch.zeros(1, 4, dtype=torch.int8)),
        "qweight: got",
    ),
    "cpu_layout_back": (
        lambda: from_cpu_layout(torch.zeros(1, 8, dtype=torch.uint8)),
        "qweight: got",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
