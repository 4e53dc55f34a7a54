"""The matrices of an OBS call: one weight or a batch of equal shapes, each with its factored Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern._dtypes import FLOATS
from llmkern.ops._hessian_factor import HessianFactor, factorize_hessian
from llmkern.ops._library import expect

Hessian = Tensor | HessianFactor | Sequence[HessianFactor]


@dataclass(frozen=True)
class Problem:
    """Weights of a batch that one op call works on, with their columns in visiting order.

    Attributes:
        experts: which of the caller's batch.
        w: float32 [E, N, K], contiguous; columns without input are zero.
        U, d: float32 [E, K, K] and [E, K].
        order: int64 [E, K], original column at each position, or None for the natural order.
        factors: one of each expert.
    """

    experts: slice
    w: Tensor
    U: Tensor
    d: Tensor
    order: Tensor | None
    factors: tuple[HessianFactor, ...]

    def visiting(self, t: Tensor) -> Tensor:
        """t [E, N, K] with its columns in visiting order."""
        return t if self.order is None else _take(t, self.order).contiguous()

    def original(self, t: Tensor) -> Tensor:
        """t [E, N, K] with its columns in their original order."""
        return t if self.order is None else _take(t, torch.argsort(self.order, dim=1))

    def groups(self, group_size: int) -> Tensor:
        """int32 [E, K], group of the original column at each position."""
        E, _, K = self.w.shape
        natural = torch.arange(K, device=self.w.device) if self.order is None else self.order
        return (natural // group_size).int().expand(E, K).contiguous()


def _take(t: Tensor, columns: Tensor) -> Tensor:
    return t.gather(2, columns[:, None, :].expand(t.shape))


def check_weight(op: str, w: Tensor) -> None:
    """Refuse a weight that is no float [N, K] or [E, N, K], or holds NaN or Inf."""
    expect(
        w.dtype in FLOATS and (w.dim() == 2 or (w.dim() == 3 and len(w) > 0)),
        op,
        "w",
        w,
        "a float matrix [N, K], or a batch of them [E, N, K]",
    )
    # One pass and no temporary, unlike isfinite; aminmax propagates NaN.
    if w.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(w)):
        raise ValueError(f"{op}: w: got NaN or Inf, expected finite weights")


def check_mask(op: str, w: Tensor, mask: Tensor) -> None:
    """Refuse what is no mask of w."""
    expect(
        mask.shape == w.shape and mask.dtype == torch.bool and mask.device == w.device,
        op,
        "mask",
        mask,
        f"bool {list(w.shape)} on {w.device}, True = kept",
    )


def problems(
    op: str, w: Tensor, H: Hessian, damp: float, act_order: bool, unit: int = 1
) -> Iterator[Problem]:
    """The weight w [N, K] or [E, N, K] in the portions in which the op is called.

    On the CPU that is one matrix at a time, so that one factor is held at a time; a GPU gets all at once.

    Args:
        H: float32 or float64 [K, K] or [E, K, K], or the factors.
        damp, act_order, unit: as `factorize_hessian` takes them; unused where factors are given.

    Raises:
        ValueError: H does not fit w, or cannot be factored for what it holds.
    """
    batch = w if w.dim() == 3 else w[None]
    E, _, K = batch.shape
    hessians = _split(op, w, H)
    for first in range(0, E, 1 if w.device.type == "cpu" else max(E, 1)):
        experts = slice(first, first + 1 if w.device.type == "cpu" else E)
        factors = tuple(_factor(h, damp, act_order, unit) for h in hessians[experts])
        for factor in factors:
            if tuple(factor.U.shape) != (K, K):
                raise ValueError(
                    f"{op}: H: got {list(factor.U.shape)}, expected [{K}, {K}] for w {list(w.shape)}"
                )
        yield _problem(experts, batch[experts], factors)


def _split(op: str, w: Tensor, H: Hessian) -> Sequence[Tensor | HessianFactor]:
    """One Hessian or factor of each expert."""
    if isinstance(H, Tensor):
        expect(H.dim() == w.dim(), op, "H", H, f"{w.dim()} axes, as w has")
        parts: Sequence[Tensor | HessianFactor] = H.unbind() if H.dim() == 3 else [H]
    else:
        parts = [H] if isinstance(H, HessianFactor) else list(H)
    experts = len(w) if w.dim() == 3 else 1
    if len(parts) != experts:
        raise ValueError(f"{op}: H: got {len(parts)} Hessians, expected {experts}")
    return parts


def _factor(H: Tensor | HessianFactor, damp: float, act_order: bool, unit: int) -> HessianFactor:
    if isinstance(H, HessianFactor):
        return H
    return factorize_hessian(H, damp=damp, act_order=act_order, unit=unit)


def _problem(experts: slice, w: Tensor, factors: tuple[HessianFactor, ...]) -> Problem:
    dead = torch.stack([factor.dead for factor in factors])
    work = w.float()
    if bool(dead.any()):
        work = work.masked_fill(dead[:, None, :], 0.0)
    if len(factors) == 1:
        U, d = factors[0].U[None], factors[0].d[None]
    else:
        U, d = (torch.stack([getattr(f, name) for f in factors]) for name in ("U", "d"))
    order = None
    if any(factor.order is not None for factor in factors):
        natural = torch.arange(w.shape[2], device=w.device)
        order = torch.stack([natural if f.order is None else f.order for f in factors])
        work = _take(work, order)
    return Problem(experts, work.contiguous(), U, d, order, factors)


@dataclass(frozen=True)
class Outcome:
    """What happened to the Hessians of a call.

    Attributes:
        damp: fraction of the mean diagonal that was added, the largest of the batch.
        unfactored: experts whose Hessian could not be factored at any damping; (0,) of one matrix.
    """

    damp: float
    unfactored: tuple[int, ...]


def outcome(factors: Sequence[HessianFactor]) -> Outcome:
    """Summary over the factors of all experts."""
    failed = tuple(i for i, factor in enumerate(factors) if not factor.factored)
    return Outcome(max((factor.damp for factor in factors), default=0.0), failed)
