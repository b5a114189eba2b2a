"""Prompts of two and of four responses, with decided, soft and tied comparisons of several weights."""

from __future__ import annotations

from typing import Any

from toolkit.training.batch import Example

K4 = [(0, 1, 1.0, 1.0), (0, 2, 0.7, 2.0), (0, 3, 0.5, 1.0), (1, 2, 0.0, 1.0), (1, 3, 0.25, 0.5), (2, 3, 1.0, 1.0)]
K2 = [(0, 1, 1.0, 1.0)]


def examples(make_trees: Any) -> list[Example]:
    trees = [*make_trees(2, seed=1, k=4), *make_trees(2, seed=2, k=2)]
    return [Example(tree, K4 if len(tree.response_ids) == 4 else K2) for tree in trees]
