"""Preference rows become examples, and examples a batch of pairs."""

from __future__ import annotations

from typing import Any

import pytest
from support.comparisons import K4, batch_of, examples
from support.small_models import engine

from toolkit.models.encoding import text_encoder
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.training.batch import examples_of

pytestmark = pytest.mark.invariant


def test_pair_weights_by_hand(tiny: Any, make_trees: Any) -> None:
    chosen = examples(make_trees)
    batch = batch_of(engine(tiny), [(7, chosen[0]), (3, chosen[2])])
    assert batch.first.tolist() == [0, 0, 0, 1, 1, 2, 4]
    assert batch.second.tolist() == [1, 2, 3, 2, 3, 3, 5]
    assert batch.prefer_first.tolist() == pytest.approx([1.0, 0.7, 0.5, 0.0, 0.25, 1.0, 1.0])
    # The first prompt's comparisons weigh 6.5 in all; each prompt has half of the batch.
    expected = [w / 6.5 / 2 for *_, w in K4] + [0.5]
    assert batch.weight.tolist() == pytest.approx(expected)
    assert batch.example.tolist() == [7, 3]
    assert batch.trees.tree.tolist() == [0, 0, 0, 0, 1, 1]


def test_rows_become_examples(tokenizer: Any) -> None:
    rows = [
        PreferenceRow(
            "a", "The film", [" is good", " is bad", " is"], [Comparison(1, 0, 0.25), Comparison(0, 1, 0.75)]
        ),
        PreferenceRow("b", "Nobody compared", [" this", " that"], []),
        PreferenceRow("c", "A tie", [" one", " two"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)]),
    ]
    encoder = text_encoder(tokenizer, rows[0].prompt)
    found = examples_of(rows, encoder, max_response_tokens=20)
    assert [example.pairs for example in found] == [[(0, 1, 0.75, 1.0)], [(0, 1, 0.5, 1.0)]]
    assert all(ids[-1] == tokenizer.eos_token_id for example in found for ids in example.tree.response_ids)
    assert examples_of([], encoder, 20) == []
