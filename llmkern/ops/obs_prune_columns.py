"""obs_prune_columns: remove whole input columns, or groups of them, and update what remains.

Greedy optimal brain surgeon in the form of `llmkern.reference.obs_prune_columns`. The loop needs only
A = H⁻¹ and G = wᵀw, both [K, K], not w: a group S costs tr(A_SS⁻¹ G_SS). Removing it changes both by a
matrix of low rank,

    A -= VᵀV              V = L⁻¹ A_S,:             A_SS = L Lᵀ
    G -= BᵀP + PᵀB        B = A_SS⁻¹ A_S,:,         P = G_S,: - G_SS B / 2

so only the blocks on their diagonals are kept up to date on every step; a row that is needed is brought
up to date when it is, and the rest after `BATCH_ROWS` rows. That downdate is nearly all of the work, K²
multiply-adds per removed column and matrix, and is `hessian_update` on every device; what a step does is
a few matrix-vector products, which torch runs as fast. What remains is solved for at the end, exactly for
the columns kept, so float32 in the loop can only make it choose between near equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.ops._hessian_factor import HessianFactor, factorize_hessian
from llmkern.ops._library import expect
from llmkern.ops._obs_blocks import full_float32
from llmkern.ops._obs_problem import check_weight
from llmkern.ops.hessian_update import hessian_update

BATCH_ROWS = 128  # removed columns between two updates of the whole matrices
_COMPACT = 8  # the matrices are cut to the columns left once 1 / _COMPACT of them are gone


@dataclass(frozen=True)
class ColumnPruneResult:
    """A weight without some of its columns.

    Attributes:
        w_hat: float32 [N, K]; the removed columns are exactly zero, the others updated.
        kept: int64, the columns kept, ascending.
        removed: int64, the columns removed, group by group in the order in which they went.
        loss: tr((w - w_hat) H (w - w_hat)ᵀ), H damped as below.
        losses: float64 [count], what each group added to it.
        damp: fraction of the mean diagonal that was added to H.
        factored: False if H could not be factored at any damping: only its diagonal then counts, and
            what remains is not updated. Callers must report it.
    """

    w_hat: Tensor
    kept: Tensor
    removed: Tensor
    loss: float
    losses: Tensor
    damp: float
    factored: bool


class _Matrix:
    """A symmetric matrix: the lower triangle of an older one, and xᵀx - yᵀy still to be added to it."""

    def __init__(self, lower: Tensor, members: Tensor) -> None:
        self.lower = lower
        self.plus: list[Tensor] = []
        self.minus: list[Tensor] = []
        rows, cols = members[:, :, None], members[:, None, :]
        # [groups, size, size] blocks on the diagonal, always up to date.
        self.blocks = lower[torch.maximum(rows, cols), torch.minimum(rows, cols)]

    def rows(self, columns: Tensor) -> Tensor:
        """Rows `columns` as they are now, [len(columns), K]."""
        out = torch.stack(
            [torch.cat([self.lower[c, :c], self.lower[c:, c]]) for c in columns.tolist()]
        )
        for signed, alpha in ((self.plus, 1), (self.minus, -1)):
            if signed:
                x = torch.cat(signed)
                out.addmm_(x[:, columns].t(), x, alpha=alpha)
        return out

    def add(self, members: Tensor, plus: Tensor | None, minus: Tensor) -> None:
        """Add plusᵀplus - minusᵀminus, both [rows, K]."""
        for x, pending, alpha in ((plus, self.plus, 1), (minus, self.minus, -1)):
            if x is not None:
                pending.append(x)
                parts = x.t()[members]  # [groups, size, rows]
                self.blocks.baddbmm_(parts, parts.transpose(1, 2), alpha=alpha)

    def flush(self) -> None:
        """Bring the whole matrix up to date."""
        for pending, alpha in ((self.plus, 1.0), (self.minus, -1.0)):
            if pending:
                hessian_update(self.lower, torch.cat(pending), alpha)
            pending.clear()

    def keep(self, columns: Tensor, groups: Tensor) -> None:
        """Cut to some columns and groups; only right after `flush`."""
        self.lower = self.lower[columns][:, columns].contiguous()
        self.blocks = self.blocks[groups].contiguous()


class _Greedy:
    """The loop over removals. Columns are grouped: group g of those left has the columns members[g]."""

    def __init__(self, A: Tensor, G: Tensor, members: Tensor, free: Tensor) -> None:
        self.members = members
        self.A, self.G = _Matrix(A, members), _Matrix(G, members)
        self.free = free  # bool [groups]: may still be removed
        self.names = torch.arange(len(members), device=A.device)
        self.gone = torch.zeros_like(free)

    def costs(self) -> Tensor:
        """tr(A_gg⁻¹ G_gg) of every group; inf where it is gone or must stay."""
        a, g = self.A.blocks, self.G.blocks
        if a.shape[1] == 1:
            costs = (g / a)[:, 0, 0]
        else:
            factor, _ = torch.linalg.cholesky_ex(a)
            costs = torch.cholesky_solve(g, factor).diagonal(dim1=1, dim2=2).sum(1)
        return costs.clamp(min=0).masked_fill(~self.free, torch.inf)

    def remove(self, group: int) -> None:
        """Downdate both matrices for a group that goes."""
        columns = self.members[group]
        a, g = self.A.rows(columns), self.G.rows(columns)
        L = torch.linalg.cholesky(a[:, columns])
        V = torch.linalg.solve_triangular(L, a, upper=False)
        B = torch.linalg.solve_triangular(L.t(), V, upper=True)
        P = g - 0.5 * g[:, columns] @ B
        # BᵀP + PᵀB as a difference of squares of comparable size.
        balance = (P.norm(dim=1) / B.norm(dim=1)).clamp(min=1e-30).sqrt()[:, None]
        x, y = 0.5**0.5 * balance * B, 0.5**0.5 * P / balance
        self.A.add(self.members, None, V)
        self.G.add(self.members, x - y, x + y)
        self.free[group] = False
        self.gone[group] = True

    def run(self, count: int) -> tuple[list[int], list[float]]:
        """Names of the removed groups and their costs, in order."""
        removed, losses, pending = [], [], 0
        for _ in range(count):
            cost, group = self.costs().min(0)
            removed.append(int(self.names[group]))
            losses.append(float(cost))
            self.remove(int(group))
            pending += self.members.shape[1]
            if pending >= BATCH_ROWS:
                pending = 0
                self._flush()
        return removed, losses

    def _flush(self) -> None:
        self.A.flush()
        self.G.flush()
        if int(self.gone.sum()) * _COMPACT < len(self.gone):
            return
        left = torch.nonzero(~self.gone)[:, 0]
        columns = self.members[left].reshape(-1).sort().values
        place = torch.full((self.A.lower.shape[0],), -1, device=columns.device)
        place[columns] = torch.arange(len(columns), device=columns.device)
        self.A.keep(columns, left)
        self.G.keep(columns, left)
        self.members = place[self.members[left]]
        self.names, self.free, self.gone = self.names[left], self.free[left], self.gone[left]


def obs_prune_columns(
    w: Tensor,
    H: Tensor,
    count: int,
    *,
    group_size: int = 1,
    groups: Tensor | None = None,
    damp: float = 0.01,
    keep: Tensor | None = None,
) -> ColumnPruneResult:
    """Remove `count` input columns of w, or groups of them, with little increase of tr(dW H dWᵀ).

    Greedy: the group that costs the least goes first, the others make up for it, and so on. The columns
    that remain are then the least-squares optimum for their choice.

    Args:
        w: float32, bfloat16 or float16 [N, K]: down_proj for the neurons of an MLP, o_proj for heads.
        H: float32 or float64 [K, K], the Hessian 2/n XᵀX of its inputs (lower triangle read).
        count: how many groups to remove.
        group_size: neighbouring columns that go together, such as a head's.
        groups: in its place, int64 [K], the group of each column; all groups 0, 1, .. of one size.
        damp: fraction of the mean diagonal added to H's diagonal, in [0, 1).
        keep: bool [K]; a group with a True column stays.

    Returns:
        A `ColumnPruneResult`. Columns that never received an input (zero diagonal) go first.

    Raises:
        ValueError: bad shapes or dtypes, NaN or Inf, a group size that does not divide K, groups of
            different sizes, or a count that leaves nothing or exceeds the groups that may go.

    Source: Hassibi & Stork 1993; Kurtić et al. 2023, arXiv 2302.04089.
    """
    check_weight("obs_prune_columns", w)
    expect(w.dim() == 2, "obs_prune_columns", "w", w, "a float matrix [N, K]")
    members = _members(w.shape[1], group_size, groups, w.device)
    free = _free(members, keep, w.shape[1], count)
    expect(
        isinstance(H, Tensor) and tuple(H.shape) == (w.shape[1],) * 2 and H.device == w.device,
        "obs_prune_columns",
        "H",
        H,
        f"[{w.shape[1]}, {w.shape[1]}] on {w.device} for w {list(w.shape)}",
    )
    factor = factorize_hessian(H, damp=damp)
    work = w.float().masked_fill(factor.dead, 0.0).contiguous()
    with full_float32():
        removed, losses = _choose(work, factor, members, free, count)
        gone = members[removed].reshape(-1)
        kept = torch.ones(w.shape[1], dtype=torch.bool, device=w.device)
        kept[gone] = False
        w_hat = _solve(work, H, factor, gone, torch.nonzero(kept)[:, 0])
        loss = _loss(work - w_hat, factor)
    return ColumnPruneResult(
        w_hat,
        torch.nonzero(kept)[:, 0],
        gone,
        loss,
        torch.tensor(losses, dtype=torch.float64),
        factor.damp,
        factor.factored,
    )


def _members(K: int, group_size: int, groups: Tensor | None, device: torch.device) -> Tensor:
    """int64 [groups, size], the columns of each group, ascending."""
    op = "obs_prune_columns"
    if groups is None:
        if group_size < 1 or K % group_size:
            raise ValueError(f"{op}: group_size: got {group_size}, expected a divisor of K = {K}")
        return torch.arange(K, device=device).view(-1, group_size)
    if group_size != 1:
        raise ValueError(f"{op}: group_size: got {group_size} beside groups, expected one of them")
    expect(
        tuple(groups.shape) == (K,) and groups.dtype == torch.int64 and groups.device == device,
        op,
        "groups",
        groups,
        f"int64 [{K}] on {device}",
    )
    if int(groups.min()) < 0:
        raise ValueError(f"{op}: groups: got {int(groups.min())}, expected groups 0, 1, ..")
    sizes = torch.bincount(groups)
    if int(sizes.min()) != int(sizes.max()):
        raise ValueError(
            f"{op}: groups: got groups of {int(sizes.min())} to {int(sizes.max())} columns, expected "
            "groups 0, 1, .. of one size"
        )
    return torch.argsort(groups, stable=True).view(len(sizes), -1)


def _free(members: Tensor, keep: Tensor | None, K: int, count: int) -> Tensor:
    """bool [groups], True = may be removed."""
    op = "obs_prune_columns"
    free = torch.ones(len(members), dtype=torch.bool, device=members.device)
    if keep is not None:
        expect(
            tuple(keep.shape) == (K,) and keep.dtype == torch.bool and keep.device == free.device,
            op,
            "keep",
            keep,
            f"bool [{K}] on {free.device}, True = must stay",
        )
        free = ~keep[members].any(1)
    most = min(int(free.sum()), len(members) - 1)
    if not 0 <= count <= most:
        raise ValueError(f"{op}: count: got {count}, expected 0 to {most} of {len(members)} groups")
    return free


def _choose(
    w: Tensor, factor: HessianFactor, members: Tensor, free: Tensor, count: int
) -> tuple[list[int], list[float]]:
    if count == 0:
        return [], []
    K = w.shape[1]
    # Reversed, the upper factor is the lower one that cholesky_inverse takes.
    L = (factor.U * factor.d).flip(0, 1)
    A = torch.cholesky_inverse(L).flip(0, 1).contiguous()
    del L
    G = w.new_zeros(K, K)
    hessian_update(G, w, 1.0)
    return _Greedy(A, G, members, free).run(count)


def _solve(w: Tensor, H: Tensor, factor: HessianFactor, gone: Tensor, kept: Tensor) -> Tensor:
    """The columns `kept` of w, updated for the others' absence: w_S + w_R H_RS H_SS⁻¹."""
    w_hat = torch.zeros_like(w)
    w_hat[:, kept] = w[:, kept]
    if not factor.factored or not len(gone):
        return w_hat
    square = torch.maximum(gone[:, None], kept), torch.minimum(gone[:, None], kept)
    pushed = w[:, gone] @ H[square].float()
    # The factor knows the diagonal that made it possible: the squares of its rows.
    diagonal = torch.cat([(rows * factor.d).square().sum(1) for rows in torch.split(factor.U, 256)])
    block = H[kept][:, kept].float()
    block.diagonal().copy_(diagonal[kept])
    L, info = torch.linalg.cholesky_ex(block)
    if int(info):
        L = torch.linalg.cholesky(block.double()).float()
    w_hat[:, kept] += torch.cholesky_solve(pushed.t(), L).t()
    return w_hat


def _loss(error: Tensor, factor: HessianFactor) -> float:
    """tr(E H Eᵀ), H damped, as a sum of squares."""
    return float((error @ factor.U).mul_(factor.d).square().sum(dtype=torch.float64))
