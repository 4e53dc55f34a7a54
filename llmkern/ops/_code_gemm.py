"""Products with a compressed weight: what w4a16_gemm, lut4_gemm and the 2:4 sparse ones share.

Each of them has a NamedTuple of its arguments, in the order of its schema, with `x` first and `bias`
among them; its backends take that and the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES, FLOATS, dtype_name
from llmkern.ops._library import LIBRARY, expect, kernels, pointer, register
from llmkern.ops._w4a16_config import CHUNK_ROWS, DENSE_BYTES, Chunks, Config, select_config

_PLAIN = Config("plain", rows=0)
Select = Callable[[int, int, int, int], Config]  # called with M, N, K and a compute capability


def check_product(
    op: str, x: Tensor, bias: Tensor | None, shape: tuple[int, int], device: torch.device
) -> None:
    """Refuse an x or a bias that does not go with a weight of `shape` (N, K) on `device`.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    N, K = shape
    if x.dim() != 2 or x.shape[1] != K or x.dtype not in FLOATS:
        expect(False, op, "x", x, f"float32, bfloat16 or float16 [M, {K}]")
    if x.device != device:
        expect(False, op, "x", x, f"the device of the weight, {device}")
    if bias is None:
        return
    if bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device:
        wanted = f"{dtype_name(x.dtype)} [{N}] on {x.device}"
        expect(False, op, "bias", bias, wanted)


def register_product(
    schema: str,
    kind: type[Any],
    backends: Sequence[Backend],
    shape: Callable[[Any], tuple[int, int]],
    dense: Callable[[Any, torch.dtype], Tensor],
) -> Callable[..., Tensor]:
    """Register the op and its gradients of x and bias.

    Args:
        schema: of the op.
        kind: the NamedTuple of its arguments.
        backends: called with an instance of it and the output.
        shape: checks the arguments and returns the weight's (N, K).
        dense: the dense weight [N, K] in a dtype, for the gradient of x; x and bias are None there.
    """
    name = schema.partition("(")[0]

    def fake(*args: Any) -> Tensor:
        call = kind(*args)
        out: Tensor = call.x.new_empty(call.x.shape[0], shape(call)[0])
        return out

    def run(*args: Any) -> Tensor:
        out = fake(*args)
        if out.numel() == 0:
            return out
        call = kind(*args)
        # Kernels read rows of x at any distance, but each row and the bias contiguously.
        if call.x.stride(1) != 1 and call.x.shape[1] != 1:
            call = call._replace(x=call.x.contiguous())
        if call.bias is not None:
            call = call._replace(bias=call.bias.contiguous())
        _backends.choose(name, backends, call, out).launch(call, out)
        return out

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call = kind(*inputs)._replace(x=None, bias=None)._asdict()
        weight = {field: value for field, value in call.items() if isinstance(value, Tensor)}
        ctx.save_for_backward(*weight.values())
        ctx.names, ctx.call = tuple(weight), {**call, **dict.fromkeys(weight)}

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        grads: dict[str, Tensor | None] = dict.fromkeys(ctx.call)
        needed = dict(zip(grads, ctx.needs_input_grad, strict=True))
        if needed["x"]:
            grads["x"] = grad @ dense(kind(**{**ctx.call, **weight}), grad.dtype)
        if needed["bias"]:
            grads["bias"] = grad.sum(0)
        return tuple(grads.values())

    op: Callable[..., Tensor] = register(schema, run, fake)
    torch.library.register_autograd(
        f"llmkern::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    return op


def multiply_rows(op: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """`op` over x [..., K] as a matrix."""
    if x.dim() == 2:
        return op(x, *rest)
    y = op(x.reshape(-1, x.shape[-1]), *rest)
    return y.view(*x.shape[:-1], y.shape[-1])


def refuse_cpu(call: Any, out: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot serve a call, or None."""
    return _backends.refuse_cpu(call.x.device.type)


def launch_cpu(op: str, weight: Mapping[str, Any], call: Any, out: Tensor) -> None:
    """Run a CPU kernel.

    Args:
        op: name of the kernel.
        weight: what it takes besides x, bias, out, their sizes and dtype.
        call: the op's arguments.
        out: [M, N].
    """
    getattr(kernels("_cpu"), op)(**weight, **_operands(call, out))


def _operands(call: Any, out: Tensor) -> dict[str, Any]:
    """The fields that the structs of all products have."""
    M, N = out.shape
    x = call.x
    return {
        "x": pointer(x),
        "bias": pointer(call.bias),
        "out": pointer(out),
        "M": M,
        "N": N,
        "K": x.shape[1],
        "x_stride": x.stride(0),
        "dtype": FLOAT_NAMES[x.dtype],
    }


def select_by(chunks: Chunks) -> Select:
    """The choice for a weight that is not sparse."""
    return lambda M, N, K, sm: select_config(M, N, K, chunks, sm)


def launch_cuda(
    op: str,
    weight: Mapping[str, Any],
    call: Any,
    out: Tensor,
    select: Select | None,
    dequantize_rows: Callable[[int, int], Tensor] | None = None,
) -> None:
    """Run a CUDA kernel, or dequantize and cuBLAS.

    Args:
        op: name of the kernel.
        weight: what it takes besides x, bias, out, their sizes and dtype, and how to run.
        call: the op's arguments.
        out: [M, N].
        select: chooses the config of a weight in the cuda layout; None for the canonical one.
        dequantize_rows: rows `first` to `last` of the weight in x's dtype, `first` a multiple of 64; for
            an op that has a "dense" tier or takes float32 x in the cuda layout.
    """
    config, workspace = _PLAIN, None
    if select is not None:
        (M, N), K = out.shape, call.x.shape[1]
        config = select(M, N, K, _backends.cuda_capability(out.device))
        if config.tier == "dense" or call.x.dtype == torch.float32:
            assert dequantize_rows is not None
            return multiply_dense(call.x, call.bias, out, dequantize_rows, DENSE_BYTES)
        if call.x.data_ptr() % 16 or call.x.stride(0) % 8:
            # It is copied in 16-byte pieces.
            call = call._replace(x=call.x.clone(memory_format=torch.contiguous_format))
        if config.split > 1 and not config.bulk:
            workspace = out.new_empty((config.split, M, N), dtype=torch.float32)
    device, stream = _backends.cuda_queue(call.x.device)
    getattr(kernels("_cuda"), op)(
        **weight,
        **_operands(call, out),
        rows=config.rows,
        split=config.split,
        bulk=config.bulk,
        workspace=pointer(workspace),
        stages=config.stages,
        device=device,
        stream=stream,
    )


def multiply_dense(
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    dequantize_rows: Callable[[int, int], Tensor],
    nbytes: int,
) -> None:
    """Multiply with pieces of the dense weight, `nbytes` at a time, so that they stay in a cache."""
    N, K = out.shape[1], x.shape[1]
    step = max(1, nbytes // max(1, CHUNK_ROWS * K * x.element_size())) * CHUNK_ROWS
    for first in range(0, N, step):
        last = min(first + step, N)
        w, piece = dequantize_rows(first, last), out[:, first:last]
        if bias is None:
            torch.mm(x, w.t(), out=piece)
        else:
            torch.addmm(bias[first:last], x, w.t(), out=piece)
