"""Trees that wait on disk, so that as many as a file of texts makes need little memory."""

from __future__ import annotations

from collections.abc import Iterable

from toolkit.models.encoding import Tree
from toolkit.storage.lazy import LazySequence
from toolkit.storage.spilled import Spill


class StoredTrees(LazySequence[Tree]):
    """Trees in their order.

    >>> trees = StoredTrees(Tree([k], [[2]]) for k in (5, 6))
    >>> trees[1], len(trees), list(trees[:1])
    (Tree(prompt_ids=[6], response_ids=[[2]]), 2, [Tree(prompt_ids=[5], response_ids=[[2]])])
    """

    def __init__(self, trees: Iterable[Tree]) -> None:
        self._stored = Spill()
        for tree in trees:
            self._stored.append((tree.prompt_ids, tree.response_ids))

    def __len__(self) -> int:
        return len(self._stored)

    def item(self, at: int) -> Tree:
        return Tree(*self._stored[at])
