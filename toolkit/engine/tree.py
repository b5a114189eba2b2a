"""The tree batch: one prompt, K responses, each token once, packed into rows for one forward pass.

A row holds a prompt once, and its K responses follow as branches. A block attention mask keeps a branch from seeing
its siblings, and the positions of each branch go on from the prompt's last. Rows are as long as the longest tree; short
trees share a row instead of padding. ``logps.py`` computes on the batch.

Shapes: B rows, T tokens in a row, S tokens without padding, N response tokens in a batch, R responses in a batch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from toolkit.engine.fast.attention import PaddingMap
from toolkit.models.encoding import Tree
from toolkit.storage.lazy import LazySequence


@dataclass(frozen=True)
class TreeBatch:
    """Packed trees. Responses are numbered in the order of the trees, their tokens in the order of the responses."""

    input_ids: torch.Tensor  # [B, T]; [1, S] without padding
    position_ids: torch.Tensor  # as input_ids
    attention_mask: torch.Tensor  # bool, [B, 1, T, T]; [B, T] where every row is one response
    padding_map: PaddingMap | None  # where the tokens stand in the mask's rows, if they come without padding
    predictor: torch.Tensor  # [N] flat index (into input_ids) of the state that a response token is predicted from
    target: torch.Tensor  # [N] the response token
    owner: torch.Tensor  # [N] which response the token belongs to
    last: torch.Tensor | None  # [R] flat index of each response's last token, if the batch has those
    tree: torch.Tensor  # [R] which tree the response belongs to
    trees: tuple[Tree, ...]  # what was packed, for a model that needs it packed in another way

    def to(self, device: torch.device) -> TreeBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trees"}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})

    @property
    def n_responses(self) -> int:
        return self.tree.numel()

    @property
    def n_tokens(self) -> int:
        return self.input_ids.numel()


def ascending(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of trees with these lengths, and the lengths, in ascending order. Of equal trees the first comes last."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
    return order, [lengths[i] for i in order]


def take_rows(order: list[int], lengths: list[int], n_rows: int) -> list[list[int]]:
    """Fill up to ``n_rows`` rows, as long as the longest tree, with trees off the end of :func:`ascending`'s lists.

    A row begins with the longest tree that is left, and goes on with the longest that fits. So the trees of a batch
    alone fill the same rows that they filled when the batch was made.
    """
    width = lengths[-1]
    rows: list[list[int]] = []
    while order and len(rows) < n_rows:
        row, room = [], width
        while fitting := bisect_right(lengths, room):
            row.append(order.pop(fitting - 1))
            room -= lengths.pop(fitting - 1)
        rows.append(row)
    return rows


def pack(
    trees: Sequence[Tree],
    pad_id: int,
    *,
    row_per_response: bool = False,
    padding: bool = True,
    last_tokens: bool = True,
) -> TreeBatch:
    """Pack trees into one batch whose rows are as long as the longest tree.

    ``row_per_response``: each response has a row of its own, with its prompt. Without ``padding`` only the mask has
    rows, and the tokens stand in one row. Without ``last_tokens`` the last token of a response is a target alone: a
    reward is read from its state, but no log-probability needs it. Raises ValueError for an empty prompt or response,
    which has no log-probability.
    """
    if not all(tree.prompt_ids and all(tree.response_ids) for tree in trees):
        raise ValueError("a tree needs at least one prompt token and one token in each response")
    whole = list(trees)
    if row_per_response:
        whole = [Tree(tree.prompt_ids, [ids]) for tree in trees for ids in tree.response_ids]
    inputs = [tree.inputs(last_tokens) for tree in whole]
    n, widths = len(inputs), list(map(len, inputs))
    rows = [[i] for i in range(n)] if row_per_response else take_rows(*ascending(widths), n)
    grid = _lay_out(inputs, rows, pad_id)
    predictor, last = _response_places(whole, inputs, grid.starts)
    responses = [ids for tree in whole for ids in tree.response_ids]
    lengths = torch.tensor([len(ids) for ids in responses])
    batch = TreeBatch(
        input_ids=grid.input_ids,
        position_ids=grid.position_ids,
        attention_mask=grid.branch >= 0 if row_per_response else _tree_mask(grid),
        padding_map=None,
        predictor=predictor,
        target=torch.tensor([token for ids in responses for token in ids]),
        owner=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        last=last if last_tokens else None,
        tree=torch.tensor([index for index, tree in enumerate(trees) for _ in tree.response_ids]),
        trees=tuple(trees),
    )
    return batch if padding or row_per_response else _without_padding(batch, grid.branch >= 0)


@dataclass(frozen=True)
class _Grid:
    """Trees in rows, all [B, T], and where each of them begins."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    branch: torch.Tensor  # -1 padding, 0 prompt, k the k-th response
    member: torch.Tensor  # which of the trees, -1 padding
    starts: list[int]  # flat index of each tree's first token


def _lay_out(trees: Sequence[Tree], rows: Sequence[Sequence[int]], pad_id: int) -> _Grid:
    """Write the trees' tokens into rows; ``rows`` has the trees' indices."""
    shape = (len(rows), max(map(len, trees)))
    input_ids, position_ids = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    branch, member = torch.full(shape, -1), torch.full(shape, -1)
    starts = [0] * len(trees)
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            starts[i] = row * shape[1] + start
            n = len(trees[i].prompt_ids)
            for k, ids in enumerate([trees[i].prompt_ids, *trees[i].response_ids]):
                stop = start + len(ids)
                first_position = n if k else 0
                input_ids[row, start:stop] = torch.tensor(ids, dtype=torch.long)
                position_ids[row, start:stop] = torch.arange(first_position, first_position + len(ids))
                branch[row, start:stop] = k
                member[row, start:stop] = i
                start = stop
    return _Grid(input_ids, position_ids, branch, member, starts)


def _response_places(
    whole: Sequence[Tree], inputs: Sequence[Tree], starts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] flat index of the state that each response token is predicted from, [R] that of each response's last token.

    ``whole`` are the trees with all their tokens, ``inputs`` those tokens that the batch has.
    """
    predictor: list[torch.Tensor] = []
    last: list[int] = []
    for tree, placed, first in zip(whole, inputs, starts, strict=True):
        start = prompt_end = first + len(placed.prompt_ids)
        for targets, ids in zip(tree.response_ids, placed.response_ids, strict=True):
            # The first token of a branch is predicted from the prompt's last one, the others from the one before.
            states = torch.arange(start - 1, start - 1 + len(targets))
            states[0] = prompt_end - 1
            predictor.append(states)
            start += len(ids)
            last.append(start - 1)
    return torch.cat(predictor), torch.tensor(last)


def _tree_mask(grid: _Grid) -> torch.Tensor:
    """[B, 1, T, T]: a token sees the tokens before it of its own tree that are in the prompt or in its own branch."""
    same_tree = grid.member[:, :, None] == grid.member[:, None, :]
    same_branch = grid.branch[:, :, None] == grid.branch[:, None, :]
    width = grid.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    # A padding position sees itself, since a row of the softmax without any key would be NaN.
    return (causal & same_tree & (same_branch | (grid.branch[:, None, :] == 0)))[:, None]


def _without_padding(batch: TreeBatch, real: torch.Tensor) -> TreeBatch:
    """The batch with its tokens in one row; ``real`` [B, T] says which places of the rows hold a token."""
    if bool(real.all()):
        return batch
    place = real.flatten().nonzero()[:, 0]
    token_at = (real.flatten().cumsum(0) - 1).clamp(min=0)  # of a padding place: the last token before it
    return replace(
        batch,
        input_ids=batch.input_ids.flatten()[place][None],
        position_ids=batch.position_ids.flatten()[place][None],
        padding_map=PaddingMap(token_of_place=token_at, place_of_token=place),
        predictor=token_at[batch.predictor],
        last=None if batch.last is None else token_at[batch.last],
    )


def split_wide(tree: Tree, attention_tokens: int) -> list[int]:
    """How many responses, in their order, each of several trees with the same prompt has instead of one wide tree.

    The number of trees is the cheapest to compute: P prompt tokens and R response tokens in a row cost
    (P + R) (1 + (P + R) / C), where C is ``attention_tokens``; per response token that is least at
    R = sqrt(P (P + C)).
    """
    prompt, lengths = len(tree.prompt_ids), [len(ids) for ids in tree.response_ids]
    best = (prompt * (prompt + attention_tokens)) ** 0.5
    n = max(1, min(len(lengths), round(sum(lengths) / best)))
    share = sum(lengths) / n
    counts = [0] * n
    before = 0
    for length in lengths:  # by the place of its middle token, so that the trees are about equally wide
        counts[min(n - 1, int((before + length / 2) / share))] += 1
        before += length
    return [count for count in counts if count]


class Pieces(LazySequence[Tree]):
    """Trees as they are computed: a wide one in several pieces (:func:`split_wide`; ``attention_tokens`` None: whole).

    Piece i has ``n_responses[i]`` responses of tree ``owner[i]``. Trees that wait on disk take no memory here.
    """

    def __init__(self, trees: Sequence[Tree], attention_tokens: int | None) -> None:
        self._trees = trees
        self.owner, self.n_responses, self._first = array("q"), array("q"), array("q")
        for index, tree in enumerate(trees):
            first = 0
            for n in split_wide(tree, attention_tokens) if attention_tokens else [len(tree.response_ids)]:
                self.owner.append(index)
                self.n_responses.append(n)
                self._first.append(first)
                first += n

    def __len__(self) -> int:
        return len(self.owner)

    def item(self, at: int) -> Tree:
        tree, first, n = self._trees[self.owner[at]], self._first[at], self.n_responses[at]
        return tree if n == len(tree.response_ids) else Tree(tree.prompt_ids, tree.response_ids[first : first + n])


def batches(
    trees: Iterable[Tree], token_budget: int, *, row_per_response: bool = False, last_tokens: bool = True
) -> Iterator[list[int]]:
    """Indices of trees in batches of at most ``token_budget`` tokens with their padding, longest trees first.

    The order within and between batches does not change any result; the caller puts results back by index.
    ``row_per_response`` and ``last_tokens`` say how :func:`pack` will lay out the batches. No tree is kept.
    """
    inputs = (tree.inputs(last_tokens) for tree in trees)
    if row_per_response:
        yield from _batches_of_single_rows([(tree.depth, len(tree.response_ids)) for tree in inputs], token_budget)
        return
    order, lengths = ascending(list(map(len, inputs)))
    while order:
        n_rows = max(1, token_budget // max(1, lengths[-1]))
        yield [i for row in take_rows(order, lengths, n_rows) for i in row]


def _batches_of_single_rows(sizes: Sequence[tuple[int, int]], token_budget: int) -> Iterator[list[int]]:
    """``sizes`` are the width of a row and the number of rows, by tree."""
    batch: list[int] = []
    n_rows = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        more = sizes[i][1]
        if batch and (n_rows + more) * sizes[batch[0]][0] > token_budget:
            yield batch
            batch, n_rows = [], 0
        batch.append(i)
        n_rows += more
    if batch:
        yield batch
