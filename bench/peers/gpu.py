"""The peers of the 4-bit matmuls on a CUDA device, as methods of `matmul`.

Written from each library's own sources (torch 2.13, bitsandbytes 0.50.2; gemlite, GPTQModel and
torchao as of summer 2026); none of it has run here. Whatever an installed version refuses or lacks is
reported as the reason why that peer has no number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import matmul
import torch
import torch.nn.functional as F
from matmul import Method, attempt
from torch import Tensor

from llmkern.formats.int4 import pack_codes

GROUP_SIZE, BLOCK_SIZE = 128, 64
INNER_K_TILES = 8  # of torch's kernel: 128 columns at a time


def all_methods() -> list[Method]:
    """Every peer, those that cannot run here with the reason."""
    return [
        matmul.dense("torch bfloat16", torch.bfloat16),
        attempt("torch int4pack", int4pack),
        attempt("bitsandbytes nf4", bitsandbytes_nf4),
        attempt("gemlite", gemlite),
        attempt("GPTQModel Marlin", marlin),
        attempt("GPTQModel Machete", machete),
        attempt("torchao plain", lambda: torchao("plain")),
        attempt("torchao preshuffled", lambda: torchao("preshuffled")),
    ]


def sparse24_methods() -> list[Method]:
    """torch's products with 2:4 sparse weights."""
    names = ("cuSPARSELt", "CUTLASS")
    return [attempt(f"torch 2:4 {name}", partial(semi_structured, name)) for name in names]


def semi_structured(name: str) -> Method:
    """torch's 2:4 tensor by one of its two libraries; cuSPARSELt searches once per number of rows."""
    kind: Any = getattr(torch.sparse, f"SparseSemiStructuredTensor{name.upper()}")
    found: dict[int, int] = {}

    def multiply(x: Tensor, operand: Any) -> Tensor:
        if name == "cuSPARSELt":
            if len(x) not in found:
                # It takes rows in multiples of 8, to which torch pads x itself when it multiplies.
                padded = F.pad(x, (0, 0, 0, -len(x) % 8))
                found[len(x)] = torch._cslt_sparse_mm_search(operand.packed, padded.t())
            operand.alg_id_cusparselt = found[len(x)]
        return F.linear(x, operand)

    return Method(
        f"torch 2:4 {name}",
        lambda w: kind.from_dense(w.bfloat16()),
        multiply,
        dense=lambda operand: operand.to_dense(),
        bytes_per_weight=1 + 1 / 8,
        copy=lambda operand: kind.from_dense(operand.to_dense()),
    )


def int4pack() -> Method:
    """torch's `_weight_int4pack_mm`; its zero point is an offset of the centre code 8."""

    def pack(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_K_TILES)
        by_group = scales.t()
        return packed, torch.stack([by_group, torch.zeros_like(by_group)], -1).contiguous()

    def multiply(x: Tensor, operand: tuple[Tensor, Tensor]) -> Tensor:
        packed, both = operand
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, both)
        return y

    return Method("torch int4pack", pack, multiply)


def bitsandbytes_nf4() -> Method:
    """bitsandbytes' NF4 in blocks of 64: `matmul_4bit`, which chooses its kernel by shape."""
    import bitsandbytes as bnb
    from bitsandbytes import functional

    def pack(w: Tensor) -> tuple[Tensor, Any]:
        packed, state = functional.quantize_4bit(
            w.bfloat16(), blocksize=BLOCK_SIZE, quant_type="nf4"
        )
        return packed, state

    def multiply(x: Tensor, operand: tuple[Tensor, Any]) -> Tensor:
        packed, state = operand
        y: Tensor = bnb.matmul_4bit(x, packed.t(), state)
        return y

    def dense(operand: tuple[Tensor, Any]) -> Tensor:
        w: Tensor = functional.dequantize_4bit(*operand)
        return w

    return Method("bitsandbytes nf4", pack, multiply, dense)


def gemlite() -> Method:
    """gemlite's Triton kernels; the first call of a shape tunes them."""
    from gemlite.helper import A16W4_HQQ_INT

    def pack(w: Tensor) -> Any:
        codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
        processor = A16W4_HQQ_INT(device=str(w.device), dtype=torch.bfloat16)
        return processor.from_weights(codes, scales, torch.full_like(scales, 8))

    return Method("gemlite", pack, _call)


def marlin() -> Method:
    """The Marlin kernel that GPTQModel compiles at its first use."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    return Method("GPTQModel Marlin", lambda w: _gptq_linear(MarlinLinear, w), _call)


def machete() -> Method:
    """The Machete kernel that GPTQModel compiles at its first use; sm_90 only."""
    from gptqmodel.nn_modules.qlinear.machete import MacheteLinear

    ok, why = MacheteLinear.validate_once()
    if not ok:
        raise RuntimeError(str(why))
    return Method("GPTQModel Machete", lambda w: _gptq_linear(MacheteLinear, w), _call)


def _gptq_linear(kind: Any, w: Tensor) -> Any:
    """One of GPTQModel's linear layers with the weight in GPTQ's layout, codes packed along K."""
    N, K = w.shape
    codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
    layer = kind(
        bits=4,
        group_size=GROUP_SIZE,
        desc_act=False,
        sym=True,
        in_features=K,
        out_features=N,
        bias=False,
        dtype=torch.bfloat16,
    ).to(w.device)
    layer.qweight.data = pack_codes(codes, 4).t().contiguous()
    layer.scales.data = scales.t().contiguous()
    layer.g_idx.data = torch.arange(K, dtype=torch.int32) // GROUP_SIZE
    layer.qzeros.data.fill_(-0x77777778)  # eight nibbles of 8
    layer.post_init()
    return layer.eval()


def torchao(packing: str) -> Method:
    """torchao's int4 weight-only linear, in the packings whose kernels come from mslk."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(
        group_size=GROUP_SIZE, int4_packing_format=packing, set_inductor_config=False
    )

    def pack(w: Tensor) -> Any:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data = w.bfloat16()
        quantize_(linear, config)
        return linear

    return Method(f"torchao {packing}", pack, _call)


def _call(x: Tensor, layer: Any) -> Tensor:
    y: Tensor = layer(x)
    return y
