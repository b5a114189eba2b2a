"""The cache that grows in place holds, at every step, what transformers' cache holds."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from toolkit.engine.fast import growing_cache
from toolkit.engine.fast.growing_cache import GrowingLayer
from toolkit.engine.fast.speedups import row_cache
from toolkit.models.load import load_policy
from toolkit.models.resolve import resolve
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant


def states(n_rows: int, n_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(n_rows, 2, n_tokens, 4).to(dtype) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16])
def test_it_holds_what_is_joined(first: torch.dtype, then: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, single tokens beyond the first room, rows that leave or are repeated, several tokens, a fresh start."""
    monkeypatch.setattr(growing_cache, "MORE_ROOM", 3)
    torch.manual_seed(0)
    own, plain = GrowingLayer(), DynamicLayer()
    steps: list[int | list[int]] = [5, 1, 1, 1, 1, 1, [0, 2], 1, [1, 0, 0, 1], 1, 1, [3, 2, 1, 0], 2, 9, 1]
    for _ in range(2):
        n_rows, dtype = 3, first
        for step in steps:
            if isinstance(step, list):
                for layer in (own, plain):
                    layer.batch_select_indices(torch.tensor(step))
                n_rows, dtype = len(step), then
                continue
            new = states(n_rows, step, dtype)
            for mine, theirs in zip(own.update(*new), plain.update(*new), strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
            assert own.get_seq_length() == plain.get_seq_length()
            assert own.get_mask_sizes(1) == plain.get_mask_sizes(1)
        for layer in (own, plain):
            layer.reset()


def test_a_token_does_not_move_those_before_it() -> None:
    own = GrowingLayer()
    own.update(*states(2, 7, torch.float32))
    places = {own.update(*states(2, 1, torch.float32))[0].data_ptr() for _ in range(growing_cache.MORE_ROOM)}
    assert len(places) == 1
    assert own.update(*states(2, 1, torch.float32))[0].data_ptr() not in places


def test_rows_that_left_are_not_kept() -> None:
    own = GrowingLayer()
    room = weakref.ref(own.update(*states(4, 7, torch.float32))[0]._base)
    assert room() is not None
    own.batch_select_indices(torch.tensor([0, 2]))
    assert room() is None


def test_sampling_uses_it() -> None:
    cache = row_cache(load_policy(resolve("tiny"), ModelSection(dtype="float32")))
    assert cache is not None and cache.layers and {type(layer) for layer in cache.layers} == {GrowingLayer}
