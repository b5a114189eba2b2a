"""The tree batch: one prompt, K responses, each token once, packed into rows for one forward pass.

A prompt stands once in a row and its K responses follow as branches. A block attention mask keeps a branch
from seeing its siblings, and positions restart behind the prompt. Short trees share a row, as long as the longest,
where padding would be. ``logps.py`` computes on it.

Shapes: B rows, T tokens in a row, S tokens without padding, N response tokens in a batch, R responses in a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from toolkit.engine.fast.attention import PaddingMap
from toolkit.models.encoding import Tree


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
    last: torch.Tensor | None  # [R] flat index of each response's last token, if those are placed
    tree: torch.Tensor  # [R] which tree the response belongs to
    trees: tuple[Tree, ...]  # what was packed, for a model that needs it packed in another way

    def to(self, device: torch.device) -> TreeBatch:
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trees"}
        return replace(self, **{name: value.to(device) for name, value in held.items() if value is not None})

    @property
    def n_responses(self) -> int:
        return self.tree.numel()

    @property
    def n_tokens(self) -> int:
        return self.input_ids.numel()


def ascending(trees: Sequence[Tree]) -> tuple[list[int], list[int]]:
    """Indices of trees, the longest last and of equals the first last, and their lengths."""
    order = sorted(range(len(trees)), key=lambda i: (len(trees[i]), -i))
    return order, [len(trees[i]) for i in order]


def take_rows(order: list[int], lengths: list[int], n_rows: int) -> list[list[int]]:
    """Take what fills up to ``n_rows`` rows as long as the longest off the end of :func:`ascending`'s lists.

    A row begins with the longest tree left, and goes on with the longest that fits; so rows of a batch's trees alone
    are the rows that the batch was made of.
    """
    width, rows = lengths[-1], []
    while order and len(rows) < n_rows:
        row, room = [], width
        while fitting := bisect_right(lengths, room):
            row.append(order.pop(fitting - 1))
            room -= lengths.pop(fitting - 1)
        rows.append(row)
    return rows


def pack(
    trees: Sequence[Tree], pad_id: int, *, plain: bool = False, padded: bool = True, ends: bool = True
) -> TreeBatch:
    """Pack trees into one batch whose rows are as long as the longest (``plain``: a row for each response).

    Without ``padded`` the mask has such rows, and the tokens stand in one without padding. Without ``ends`` the last
    token of a response is a target alone: its own state has a reward, and no log-probability needs it. Raises
    ValueError for an empty prompt or response, which has no log-probability.
    """
    if not all(tree.prompt_ids and all(tree.response_ids) for tree in trees):
        raise ValueError("a tree needs at least one prompt token and one token in each response")
    tree_of = [index for index, tree in enumerate(trees) for _ in tree.response_ids]
    whole = [Tree(tree.prompt_ids, [ids]) for tree in trees for ids in tree.response_ids] if plain else trees
    placed = [tree.placed(ends) for tree in whole]
    rows = [[i] for i in range(len(placed))] if plain else take_rows(*ascending(placed), n_rows=len(placed))
    width = max(map(len, placed))
    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    branch = torch.full((len(rows), width), -1)  # -1 padding, 0 prompt, k the k-th response
    member = torch.full((len(rows), width), -1)  # which of the trees
    starts: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            starts[i] = row, start
            start += len(placed[i])
    predictor: list[torch.Tensor] = []
    target: list[int] = []
    lengths: list[int] = []
    last: list[int] = []
    for i, tree in enumerate(placed):
        row, first = starts[i]
        n = len(tree.prompt_ids)
        start = first + n
        input_ids[row, first:start] = torch.tensor(tree.prompt_ids)
        position_ids[row, first:start] = torch.arange(n)
        branch[row, first:start] = 0
        member[row, first : first + len(tree)] = i
        for k, (ids, targets) in enumerate(zip(tree.response_ids, whole[i].response_ids, strict=True), start=1):
            stop = start + len(ids)
            input_ids[row, start:stop] = torch.tensor(ids, dtype=torch.long)
            position_ids[row, start:stop] = torch.arange(n, n + len(ids))
            branch[row, start:stop] = k
            # The first token of a branch is predicted from the prompt's last one, the others from the one before.
            states = torch.arange(start - 1, start - 1 + len(targets))
            states[0] = first + n - 1
            predictor.append(states + row * width)
            target += targets
            lengths.append(len(targets))
            last.append(row * width + stop - 1)
            start = stop
    if plain:
        mask = branch >= 0
    else:
        same_tree = member[:, :, None] == member[:, None, :]
        same_branch = branch[:, :, None] == branch[:, None, :]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        # A padding position sees itself, since a row of the softmax without any key would be NaN.
        mask = (causal & same_tree & (same_branch | (branch[:, None, :] == 0)))[:, None]
    batch = TreeBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        padding_map=None,
        predictor=torch.cat(predictor),
        target=torch.tensor(target),
        owner=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        last=torch.tensor(last) if ends else None,
        tree=torch.tensor(tree_of),
        trees=tuple(trees),
    )
    return batch if padded or plain else _without_padding(batch, branch >= 0)


def _without_padding(batch: TreeBatch, real: torch.Tensor) -> TreeBatch:
    """``real`` [B, T]: which places of the rows hold a token."""
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


def pieces(tree: Tree, attention_tokens: int) -> list[Tree]:
    """A wide tree as several with the same prompt, the responses in their order: what is cheapest to compute.

    P prompt tokens and R response tokens in a row cost (P + R) (1 + (P + R) / C), C being ``attention_tokens``; per
    response token that is least at R = sqrt(P (P + C)).
    """
    prompt, lengths = len(tree.prompt_ids), [len(ids) for ids in tree.response_ids]
    best = (prompt * (prompt + attention_tokens)) ** 0.5
    n = max(1, min(len(lengths), round(sum(lengths) / best)))
    share = sum(lengths) / n
    groups: list[list[list[int]]] = [[] for _ in range(n)]
    before = 0
    for ids in tree.response_ids:  # by the place of its middle token, so that the pieces are about equal
        groups[min(n - 1, int((before + len(ids) / 2) / share))].append(ids)
        before += len(ids)
    return [Tree(tree.prompt_ids, group) for group in groups if group]


def batches(trees: Sequence[Tree], token_budget: int, *, plain: bool = False, ends: bool = True) -> Iterator[list[int]]:
    """Indices of trees in batches of at most ``token_budget`` tokens with their padding, longest trees first.

    The order within and between batches does not change any result; the caller puts results back by index. ``plain``:
    each response will have a row of its own, as :func:`pack` has it then; ``ends`` as there.
    """
    trees = [tree.placed(ends) for tree in trees]
    if plain:
        yield from _of_single_rows(trees, token_budget)
        return
    order, lengths = ascending(trees)
    while order:
        n_rows = max(1, token_budget // max(1, lengths[-1]))
        yield [i for row in take_rows(order, lengths, n_rows) for i in row]


def _of_single_rows(trees: Sequence[Tree], token_budget: int) -> Iterator[list[int]]:
    widths = [tree.depth for tree in trees]
    chosen: list[int] = []
    rows = 0
    for i in sorted(range(len(trees)), key=lambda i: (-widths[i], i)):
        more = len(trees[i].response_ids)
        if chosen and (rows + more) * widths[chosen[0]] > token_budget:
            yield chosen
            chosen, rows = [], 0
        chosen.append(i)
        rows += more
    if chosen:
        yield chosen
