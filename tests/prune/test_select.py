"""Which weights stay: exactly as many as asked for, the largest ones, ties in a fixed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkern.prune._amount import Pattern, check_fraction, parse_pattern
from llmkern.prune._select import select


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.999),
    values=st.integers(1, 4),
    scope=st.sampled_from(["layer", "row"]),
    seed=st.integers(0, 1 << 16),
)
def test_exactly_the_smallest_go(
    rows: int, columns: int, sparsity: float, values: int, scope: str, seed: int
) -> None:
    """Few distinct values, so that most bounds are tied."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (rows, columns), generator=generator).float()
    mask = select(scores, sparsity, scope)
    flat = scores if scope == "row" else scores.view(1, -1)
    order = flat.argsort(dim=1, stable=True)  # of equal scores the first goes first
    wanted = torch.ones_like(flat, dtype=torch.bool)
    wanted.scatter_(1, order[:, : round(sparsity * flat.shape[1])], False)
    assert torch.equal(mask, wanted.view(rows, columns))


@given(
    pattern=st.tuples(st.integers(1, 7), st.integers(2, 8)).filter(lambda p: p[0] < p[1]),
    values=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
)
def test_every_group_keeps_its_n_largest(pattern: tuple[int, int], values: int, seed: int) -> None:
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (3, 4 * m), generator=generator).float()
    mask = select(scores, Pattern(n, m), "layer")
    groups, kept = scores.view(-1, m), mask.view(-1, m)
    assert bool((kept.sum(1) == n).all())
    lowest_kept = groups.masked_fill(~kept, torch.inf).amin(1)
    highest_gone = groups.masked_fill(kept, -torch.inf).amax(1)
    assert bool((lowest_kept >= highest_gone).all())


def test_layer_and_row_differ() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert select(scores, 0.5, "layer").tolist() == [[False] * 4, [True] * 4]
    assert select(scores, 0.5, "row").tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("value", ["2:4", (2, 4), [2, 4], Pattern(2, 4)], ids=str)
def test_patterns_can_be_written_in_several_ways(value: object) -> None:
    assert parse_pattern(value) == Pattern(2, 4)
    assert str(parse_pattern(value)) == "2:4"


@pytest.mark.parametrize(
    "value", ["4:2", "4:4", "0:4", "2:9", "2", "a:b", "2:4:8", 0.5, (2,), (2.0, 4)], ids=str
)
def test_other_patterns_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"pattern: got .*, expected n kept of m") as caught:
        parse_pattern(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 7, float("nan"), "0.5", True], ids=str)
def test_fractions_are_checked(value: object) -> None:
    with pytest.raises(ValueError, match=r"ratio: got .*, expected a fraction in \[0, 1\)"):
        check_fraction(value, "ratio")
