"""ggml's 4-bit products (llama.cpp), its shared libraries called with ctypes.

`make bench-peers` builds them; $LLMKERN_GGML or a folder `ggml` beside the environment's `bin` says
where they are. The weight lies in one of the buffer types that llama.cpp would choose from: repacked
for the CPU's vector instructions, or for AMX. One graph per copy of the weight holds one product.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matmul import Method, absent
from torch import Tensor

TYPES = {"Q4_0": 2, "Q4_K": 12}
F32 = 0
CPU_DEVICE = 0
GRAPH_NODES = 8
NOTE = "rounds the activations to 8 bits"
# The rounding of x to 8 bits per 32 (Q4_0) or 256 values (Q4_K) alone makes an error of about 0.5 %.
TOLERANCE = 0.02


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    """The head of ggml's struct of that name; `to_float` is the last member used."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


# name: (result, arguments...)
_BASE = {
    "ggml_init": (c_void_p, _InitParams),
    "ggml_version": (c_char_p,),
    "ggml_free": (None, c_void_p),
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), c_int),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (
        c_size_t,
        c_int,
        c_void_p,
        c_void_p,
        c_int64,
        c_int64,
        c_int64,
        c_void_p,
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}
_REGISTRY = {"ggml_backend_dev_by_type": (c_void_p, c_int)}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
}


class Library:
    """The functions of libggml-base, libggml and libggml-cpu that a product needs."""

    def __init__(self, folder: Path) -> None:
        for stem, functions in (("ggml-base", _BASE), ("ggml-cpu", _CPU), ("ggml", _REGISTRY)):
            shared = ctypes.CDLL(str(folder / f"lib{stem}.so"), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in functions.items():
                function = getattr(shared, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self._quiet = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *line: None)
        self.log_set(ctypes.cast(self._quiet, c_void_p), None)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())

    def buffer_types(self) -> dict[str, int]:
        """The CPU's special buffer types by name: CPU_REPACK, AMX, ... as far as it has them."""
        registry = self.backend_dev_backend_reg(self.backend_dev_by_type(CPU_DEVICE))
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.backend_reg_get_proc_address(registry, name)
        if not address:
            return {}
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        found: dict[str, int] = {}
        for kind in listed(self.backend_dev_by_type(CPU_DEVICE)):
            if not kind:
                break
            found[self.backend_buft_name(kind).decode()] = kind
        return found

    def context(self, tensors: int, graphs: int = 0) -> int:
        """A context for so many tensors and graphs, their data elsewhere."""
        size = tensors * self.tensor_overhead()
        size += graphs * self.graph_overhead_custom(GRAPH_NODES, False)
        context: int = self.init(_InitParams(size, None, True))
        return context


class Operand:
    """A weight [N, K] in one of ggml's types and buffer types; freed with the object."""

    def __init__(
        self, lib: Library, kind: int, buffer_type: int, blocks: Tensor, shape: Any
    ) -> None:
        self.lib, self.kind, self.buffer_type = lib, kind, buffer_type
        self.blocks, self.shape = blocks, shape
        self._context = lib.context(1)
        self.tensor = lib.new_tensor_2d(self._context, kind, shape[1], shape[0])
        self._buffer = lib.backend_alloc_ctx_tensors_from_buft(self._context, buffer_type)
        if not self._buffer:
            raise RuntimeError("no buffer for the weight")
        lib.backend_tensor_set(self.tensor, blocks.data_ptr(), 0, blocks.numel())

    def __del__(self) -> None:
        if getattr(self, "_buffer", None):
            self.lib.backend_buffer_free(self._buffer)
        self.lib.free(self._context)

    def another(self) -> Operand:
        """The same weight in another buffer."""
        return Operand(self.lib, self.kind, self.buffer_type, self.blocks, self.shape)

    def dense(self) -> Tensor:
        """The float32 weight, decoded by ggml."""
        w = torch.empty(self.shape, dtype=torch.float32)
        traits = self.lib.get_type_traits(self.kind).contents
        traits.to_float(self.blocks.data_ptr(), w.data_ptr(), w.numel())
        return w


class Products:
    """The products of x with each weight of a ring, a graph each."""

    def __init__(self, x: Tensor, ring: Sequence[Operand]) -> None:
        self.lib, self._ring = ring[0].lib, ring
        lib, x = self.lib, x.float().contiguous()
        number = len(ring)
        self._context = lib.context(1 + number, number)
        M, K = x.shape
        shared = lib.new_tensor_2d(self._context, F32, K, M)
        outputs, self._graphs = [], []
        for operand in ring:
            outputs.append(lib.mul_mat(self._context, operand.tensor, shared))
            graph = lib.new_graph_custom(self._context, GRAPH_NODES, False)
            lib.build_forward_expand(graph, outputs[-1])
            self._graphs.append(graph)
        self._buffer = lib.backend_alloc_ctx_tensors(self._context, lib.backend)
        if not lib.backend_supports_op(lib.backend, outputs[0]):
            raise RuntimeError("this CPU has no such kernel for this type and shape")
        lib.backend_tensor_set(shared, x.data_ptr(), 0, x.nbytes)
        self._y = [_view(lib.get_data(out), (M, ring[0].shape[0])) for out in outputs]

    def __del__(self) -> None:
        if getattr(self, "_buffer", None):
            self.lib.backend_buffer_free(self._buffer)
        self.lib.free(self._context)

    def __call__(self, i: int) -> Tensor:
        """The product with copy i; valid until its next turn."""
        i %= len(self._graphs)
        if self.lib.backend_graph_compute(self.lib.backend, self._graphs[i]):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return self._y[i]


def _view(address: int, shape: tuple[int, int]) -> Tensor:
    values = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.frombuffer(values, dtype=torch.float32).view(shape)


@cache
def library() -> Library:
    """The library; raises OSError, naming the files, where it is not built."""
    folder = os.environ.get("LLMKERN_GGML", Path(sys.prefix) / "ggml")
    return Library(Path(folder))


def version() -> str | None:
    """Of the library, or None where there is none."""
    try:
        text: bytes = library().version()
    except (OSError, AttributeError):
        return None
    return text.decode()


def methods() -> list[Method]:
    """Q4_0 and Q4_K in every special buffer type that this CPU has."""
    try:
        kinds = library().buffer_types()
    except (OSError, AttributeError) as error:
        return [absent(f"ggml {name}", f"{error} (make bench-peers builds it)") for name in TYPES]
    if not kinds:
        return [absent(f"ggml {name}", "this build repacks for no CPU") for name in TYPES]
    return [_method(name, kind, kinds[kind]) for name in TYPES for kind in kinds]


def _method(type_name: str, buffer_name: str, buffer_type: int) -> Method:
    def pack(w: Tensor) -> Operand:
        lib, kind = library(), TYPES[type_name]
        w = w.contiguous()
        blocks = torch.empty(lib.row_size(kind, w.shape[1]) * len(w), dtype=torch.uint8)
        lib.quantize_chunk(kind, w.data_ptr(), blocks.data_ptr(), 0, *w.shape, None)
        return Operand(lib, kind, buffer_type, blocks, tuple(w.shape))

    def multiply(x: Tensor, operand: Operand) -> Tensor:
        return Products(x, [operand])(0).clone()

    bind: Callable[[Tensor, Sequence[Any]], Callable[[int], Tensor]] = Products
    return Method(
        f"ggml {type_name} {buffer_name.removeprefix('CPU_').lower()}",
        pack,
        multiply,
        dense=Operand.dense,
        x_dtype=torch.float32,
        tolerance=TOLERANCE,
        copy=Operand.another,
        bind=bind,
        note=NOTE,
    )
