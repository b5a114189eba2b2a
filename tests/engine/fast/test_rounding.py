"""Stochastic rounding keeps small changes in the mean, and leaves alone what needs no rounding."""

from __future__ import annotations

import pytest
import torch

from toolkit.engine.fast.rounding import stochastically_rounded

NARROW = [torch.bfloat16, torch.float16]
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(400, 501, generator=GENERATOR) * 0.02
DIRECTION = torch.randn(400, 501, generator=GENERATOR)


def kept(rounded: torch.Tensor, weights: torch.Tensor, update: torch.Tensor) -> float:
    """Which multiple of the update the rounded weights have moved by, along it."""
    return float(((rounded.float() - weights) * update).sum() / update.square().sum())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("share", [0.05, 0.3, 3.0])
def test_an_update_is_kept_in_the_mean(dtype: torch.dtype, share: float) -> None:
    """``share``: the update's size beside the distance of two neighbours of a typical weight."""
    weights = WEIGHTS.to(dtype).float()
    update = DIRECTION * (share * torch.finfo(dtype).eps * 0.016)
    exact = weights + update
    assert kept(stochastically_rounded(exact, dtype, "a"), weights, update) == pytest.approx(1, abs=0.03)
    if share < 0.1:
        assert kept(exact.to(dtype), weights, update) < 0.3


@pytest.mark.parametrize("dtype", NARROW)
def test_a_value_becomes_one_of_its_neighbours_and_stays_where_it_has_none(dtype: torch.dtype) -> None:
    rounded = stochastically_rounded(WEIGHTS, dtype, "a").float()
    nearest = WEIGHTS.to(dtype).float()
    distance = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(WEIGHTS.abs()))
    normal = WEIGHTS.abs() > torch.finfo(dtype).tiny
    assert bool(((rounded - WEIGHTS).abs() < distance)[normal].all())
    assert 0.2 < float((rounded != nearest).float().mean()) < 0.3  # a quarter, where nothing prefers a neighbour
    assert torch.equal(stochastically_rounded(nearest, dtype, "a").float(), nearest)
    special = torch.tensor([0.0, -0.0, 1.0, -1.5, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(stochastically_rounded(special, dtype, "a")[:6], special[:6].to(dtype))
    assert bool(stochastically_rounded(special, dtype, "a")[6].isnan())


def test_the_same_weight_is_rounded_equally_again() -> None:
    first, again, other = (stochastically_rounded(WEIGHTS, torch.bfloat16, name) for name in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    turned = stochastically_rounded(WEIGHTS.t(), torch.bfloat16, "a")
    assert torch.equal(turned, stochastically_rounded(WEIGHTS.t().contiguous(), torch.bfloat16, "a"))


@pytest.mark.parametrize(("exact", "dtype"), [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)])
def test_nothing_is_random_where_the_precision_is_not_lower_than_fp32(exact: torch.dtype, dtype: torch.dtype) -> None:
    assert torch.equal(stochastically_rounded(WEIGHTS.to(exact), dtype, "a"), WEIGHTS.to(dtype))
