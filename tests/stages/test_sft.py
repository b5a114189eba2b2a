"""Imitation of the preferred responses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_models import engine

from toolkit.errors import DataError
from toolkit.models.encoding import text_encoder
from toolkit.preferences import splits
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.stages import sft
from toolkit.training.batch import Example, collate

pytestmark = pytest.mark.invariant


def test_sft_imitates_the_response_that_wins_most() -> None:
    row = PreferenceRow("a", "", ["x", "y", "z"], [Comparison(2, 0), Comparison(1, 0), Comparison(2, 1, 0.4)])
    assert splits.imitated(row, "preferred") == [2]
    assert splits.imitated(row, "all") == [0, 1, 2]
    tied = PreferenceRow("a", "", ["x", "y"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)])
    assert splits.imitated(tied, "preferred") == [0]


def test_of_a_prompt_that_nobody_compared_nothing_is_preferred(tokenizer: Any) -> None:
    """Of annotators that are not asked for (data.annotators) the row stays, without comparisons."""
    rows = [
        PreferenceRow("a", "Q", [" yes", " no"], [Comparison(1, 0)]),
        PreferenceRow("b", "R", [" one", " two"], []),
    ]
    encoder = text_encoder(tokenizer, "Q")
    [example] = sft.imitated_examples(rows, "preferred", encoder, 9)
    assert example.tree == encoder.encode("Q", [" no"], 9).tree
    assert [len(e.tree.response_ids) for e in sft.imitated_examples(rows, "all", encoder, 9)] == [2, 2]
    with pytest.raises(DataError, match="no training prompt has a comparison") as caught:
        sft.imitated_examples(rows[1:], "preferred", encoder, 9)
    assert caught.value.where == "sft.train_on"


def test_imitation_in_parts_is_the_mean_over_all_tokens(tiny: Any, make_trees: Any) -> None:
    items = [(k, Example(tree, [])) for k, tree in enumerate(make_trees(5, seed=8))]
    whole, parts = (engine(tiny, token_budget=n) for n in (10_000, 40))
    [batch] = collate(whole, items)["batch"]
    expected, _ = sft.completion_loss(whole, batch)
    split = [sft.completion_loss(parts, part)[0] for part in collate(parts, items)["batch"]]
    assert len(split) > 1
    assert sum(split).item() == pytest.approx(expected.item(), abs=1e-5)
    every = torch.cat([t for row in whole.logps([e.tree for _, e in items]) for t in row])
    assert expected.item() == pytest.approx(-every.mean().item(), abs=1e-5)
