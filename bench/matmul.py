"""Products with a compressed weight: what the contenders of the matmul benches have in common.

A `Method` says how to hold a weight [N, K] and how to multiply by it. `cases` packs one weight by
every method, fills the rings, and yields one case per number of rows. Every result is checked before
it is timed: out @ R against x @ (wᵀ R) in float64, for the weight w that the packed operand stands
for and 16 columns R of random signs, which costs no full product in float64 (Freivalds, 1977).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Contender
from torch import Tensor

ROWS_AT_ONCE = 1024
# A weight in 4 bits is not farther than this from the original: a packing gone wrong is far off.
WEIGHT_TOLERANCE = 0.2


@dataclass(frozen=True)
class Method:
    """A way to hold a weight [N, K] and to multiply by it.

    Attributes:
        name: of the contender.
        pack: makes the operand from a float32 weight.
        matmul: x [M, K] in `x_dtype` and an operand to y [M, N].
        dense: the weight that an operand stands for; None: probed with unit vectors.
        x_dtype: of the activations.
        tolerance: relative error that the result may have: the rounding of the output, of partial
            sums, and of whatever else the note tells.
        bytes_per_weight: of an operand, scales left out.
        copy: another operand of the same content in memory of its own.
        bind: for libraries with graphs of their own: x and the ring to a function of the index.
        ours: whether it is this project's.
        note: how its job differs from the others'.
        unavailable: why it cannot run here, or None.
    """

    name: str
    pack: Callable[[Tensor], Any]
    matmul: Callable[[Tensor, Any], Tensor]
    dense: Callable[[Any], Tensor] | None = None
    x_dtype: torch.dtype = torch.bfloat16
    tolerance: float = 1e-2
    bytes_per_weight: float = 0.5
    copy: Callable[[Any], Any] = copy.deepcopy
    bind: Callable[[Tensor, Sequence[Any]], Callable[[int], Tensor]] | None = None
    ours: bool = False
    note: str | None = None
    unavailable: str | None = None


def absent(name: str, why: str) -> Method:
    """A method that cannot run here; it is listed with the reason."""
    return Method(name, lambda w: None, lambda x, operand: x, unavailable=why)


def attempt(name: str, make: Callable[[], Method]) -> Method:
    """The method, or its absence where making it raises, as where a package is not installed."""
    try:
        return make()
    except Exception as error:
        return absent(name, harness.reason(error))


def dense(name: str, dtype: torch.dtype, tolerance: float = 1e-2) -> Method:
    """torch's own product with the weight in `dtype`."""
    return Method(
        name,
        pack=lambda w: w.to(dtype),
        matmul=F.linear,
        dense=lambda w: w,
        x_dtype=dtype,
        tolerance=tolerance,
        bytes_per_weight=dtype.itemsize,
        copy=Tensor.clone,
    )


class Packed:
    """One weight, packed by a method: the ring of its copies, and what results are checked with."""

    def __init__(self, method: Method, w: Tensor, ring: int, signs: Tensor) -> None:
        self.method = method
        self.shape = w.shape
        self.problem = method.unavailable
        if self.problem is None:
            try:
                self._prepare(w, ring, signs)
            except Exception as error:
                if method.ours:
                    raise
                self.problem = harness.reason(error)

    def _prepare(self, w: Tensor, ring: int, signs: Tensor) -> None:
        method = self.method
        first = method.pack(w)
        stands_for = method.dense(first) if method.dense else self._probe(first)
        self._signs = signs
        self._projection = torch.zeros(w.shape[1], signs.shape[1], dtype=torch.float64)
        error = norm = 0.0
        for start in range(0, len(w), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = stands_for[rows].double()
            self._projection += part.t() @ signs[rows]
            error += float((part - w[rows]).square().sum())
            norm += float(w[rows].double().square().sum())
        if error > WEIGHT_TOLERANCE**2 * norm:
            raise ValueError(f"the packed weight is {(error / norm) ** 0.5:.2f} off the original")
        del stands_for
        number = harness.copies(int(w.numel() * method.bytes_per_weight), ring) if ring else 1
        self.ring = [first, *(method.copy(first) for _ in range(number - 1))]

    def _probe(self, operand: Any) -> Tensor:
        """The weight from products with unit vectors, which are exact."""
        K = self.shape[1]
        parts = []
        for start in range(0, K, ROWS_AT_ONCE):
            x = torch.zeros(min(ROWS_AT_ONCE, K - start), K, dtype=self.method.x_dtype)
            x[:, start : start + len(x)].fill_diagonal_(1)
            parts.append(self.method.matmul(x, operand).t())
        return torch.cat(parts, 1)

    def mismatch(self, x: Tensor, out: Tensor) -> str | None:
        """What is wrong with `out` as the product with x, or None."""
        if out.shape != (len(x), self.shape[0]):
            return f"shape {tuple(out.shape)}, expected {(len(x), self.shape[0])}"
        spec = x.double() @ self._projection
        error = float((out.double() @ self._signs - spec).norm() / spec.norm())
        if not error <= self.method.tolerance:  # NaN included
            return f"relative error {error:.1e} > {self.method.tolerance:.1e}"
        return None

    def contender(self, x: Tensor) -> Contender:
        """The product with x, the ring's copies in turn."""
        method = self.method
        if self.problem is not None:
            return harness.missing(method.name, self.problem)
        x, ring, matmul = x.to(method.x_dtype), self.ring, method.matmul
        if method.bind:
            run = method.bind(x, ring)
        else:

            def run(i: int) -> Tensor:
                return matmul(x, ring[i % len(ring)])

        return Contender(
            method.name,
            run,
            lambda out: self.mismatch(x, out),
            method.ours,
            copies=len(ring),
            note=method.note,
        )


def weight(N: int, K: int) -> Tensor:
    """A float32 weight [N, K] of normally distributed values that keeps the scale of x."""
    return torch.randn(N, K) / K**0.5


def sparse24_weight(N: int, K: int) -> Tensor:
    """`weight` with the two smallest of every four columns pruned."""
    groups = weight(N, K).view(N, K // 4, 4)
    smallest = groups.abs().topk(2, -1, largest=False).indices
    return groups.scatter(2, smallest, 0.0).view(N, K)


def round_to_nearest(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric 4-bit codes, uint8 [N, K] with 8 for zero, and bfloat16 scales [N, K/group_size]."""
    groups = w.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(2) / 7.5).bfloat16()
    codes = (groups / scales[..., None].float()).round().clamp(-8, 7) + 8
    return codes.flatten(1).to(torch.uint8), scales


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight of `round_to_nearest`."""
    groups = codes.unflatten(1, (scales.shape[1], -1)).float() - 8
    return (groups * scales[..., None].float()).flatten(1)


def signs(N: int) -> Tensor:
    """Columns [N, 16] of random signs to project results on."""
    return torch.randint(0, 2, (N, 16)).double() * 2 - 1


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x14336" as two numbers."""
    first, second = (int(part) for part in text.split("x"))
    return first, second


def cases(
    methods: Sequence[Method],
    shapes: Iterable[tuple[int, int]],
    rows: Sequence[int],
    weight_bytes: float,
    ring: int,
    make: Callable[[int, int], Tensor] = weight,
) -> Iterator[Case]:
    """One case per shape (K, N) and number of rows; packs once per shape.

    Args:
        methods: the contenders' methods.
        shapes: pairs (K, N).
        rows: the numbers M of rows of x.
        weight_bytes: per element of the weight, scales included, in our way of holding it.
        ring: bytes that the copies of an operand fill at least; 0: one copy, warm in the caches.
        make: of N and K, the weight that is packed.
    """
    for K, N in shapes:
        torch.manual_seed(0)
        yield from _shape_cases(methods, make(N, K), rows, weight_bytes, ring)


def _shape_cases(
    methods: Sequence[Method],
    w: Tensor,
    rows: Sequence[int],
    weight_bytes: float,
    ring: int,
) -> Iterator[Case]:
    N, K = w.shape
    R = signs(N)
    packed = [Packed(method, w, ring, R) for method in methods]
    del w
    for M in rows:
        x = torch.randn(M, K)
        yield Case(
            f"M={M} K={K} N={N}" + ("" if ring else " warm"),
            [each.contender(x) for each in packed],
            bytes=N * K * weight_bytes + 2 * M * (K + N),
            flops=2 * M * N * K,
        )
