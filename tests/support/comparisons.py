"""Prompts of two and of four responses, with decided, soft and tied comparisons of several weights; batches of them."""

from __future__ import annotations

from typing import Any

import torch

from support.small_models import one_response
from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree
from toolkit.training.batch import Example, PairBatch, collate

K4 = [(0, 1, 1.0, 1.0), (0, 2, 0.7, 2.0), (0, 3, 0.5, 1.0), (1, 2, 0.0, 1.0), (1, 3, 0.25, 0.5), (2, 3, 1.0, 1.0)]
K2 = [(0, 1, 1.0, 1.0)]


def examples(make_trees: Any) -> list[Example]:
    trees = [*make_trees(2, seed=1, k=4), *make_trees(2, seed=2, k=2)]
    return [Example(tree, K4 if len(tree.response_ids) == 4 else K2) for tree in trees]


def batch_of(scorer: Engine, chosen: list[tuple[int, Example]]) -> PairBatch:
    [batch] = collate(scorer, chosen)["batch"]
    return batch


def moved(model: Any) -> Any:
    """A policy that has left its reference, in the weights that train."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in filter(lambda w: w.requires_grad, model.parameters()):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def summed_logps(model: Any, tree: Tree) -> list[float]:
    """Of each response, one unpadded pass each."""
    return [float(one_response(model, tree.prompt_ids, ids, 1.0)[0].sum()) for ids in tree.response_ids]
