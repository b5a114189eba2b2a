"""Examples as batches of trees with their comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from toolkit.engine.engine import Engine
from toolkit.engine.tree import TreeBatch
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow


@dataclass(frozen=True)
class Example:
    """One prompt for a comparison loss. ``pairs`` are (i, j, share of the weight that prefers i, weight).

    ``margins``: for each pair, by how much the preferred reward should be higher; none where the data has none.
    """

    tree: Tree
    pairs: list[tuple[int, int, float, float]]
    margins: tuple[float, ...] = ()


@dataclass(frozen=True)
class PairBatch:
    """Packed prompts with all their comparisons, P in all: a batch, or a part of one that is computed at once. Each
    prompt's weights add up to 1 / prompts of the whole batch, so that weighted sums, added over the parts, are the mean
    over prompts of the mean over comparisons (Ouyang et al. 2022, equation 1)."""

    trees: TreeBatch
    first: torch.Tensor  # [P] response i
    second: torch.Tensor  # [P] response j
    prefer_first: torch.Tensor  # [P] in [0, 1]
    weight: torch.Tensor  # [P]
    margin: torch.Tensor  # [P] by how much the preferred reward should be higher
    example: torch.Tensor  # [n_prompts] which of the stage's examples each prompt is
    token_share: torch.Tensor  # [] this part's share of the whole batch's response tokens

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def examples_of(rows: Sequence[PreferenceRow], encoder: TextEncoder, max_response_tokens: int) -> list[Example]:
    """Rows as token ids, those without any comparison left out."""
    out = []
    for row in rows:
        found = splits.pairs(row)
        if found:
            encoded = encoder.encode(row.prompt, row.responses, max_response_tokens)
            pairs = [(pair.i, pair.j, pair.p, pair.weight) for pair in found]
            out.append(Example(encoded.tree, pairs, tuple(splits.margins(row))))
    return out


def collate(engine: Engine, examples: Sequence[tuple[int, Example]]) -> dict[str, list[PairBatch]]:
    """Pack numbered examples into one batch on the engine's device, under the key ``batch``: the parts of it that fit
    the engine's token budget. How many prompts make a step is statistics, how many are computed at once is hardware:
    the gradients are the same, and the memory is that of a part.
    """
    n_tokens = sum(len(ids) for _, example in examples for ids in example.tree.response_ids)
    parts = []
    for indices in engine.batches([example.tree for _, example in examples]):
        chosen = [examples[i] for i in sorted(indices)]
        parts.append(_pair_batch(engine, chosen, len(examples), n_tokens).to(engine.device))
    return {"batch": parts}


def _pair_batch(engine: Engine, examples: Sequence[tuple[int, Example]], n_prompts: int, n_tokens: int) -> PairBatch:
    """A part of a batch of ``n_prompts`` prompts with ``n_tokens`` response tokens."""
    first, second, prefer, weight, margin = [], [], [], [], []
    offset = 0
    for _, example in examples:
        total = sum(w for *_, w in example.pairs)
        for i, j, p, w in example.pairs:
            first.append(offset + i)
            second.append(offset + j)
            prefer.append(p)
            weight.append(w / total / n_prompts)
        margin += example.margins or (0.0,) * len(example.pairs)
        offset += len(example.tree.response_ids)
    trees = engine.pack([example.tree for _, example in examples])
    return PairBatch(
        trees=trees,
        first=torch.tensor(first, dtype=torch.long),
        second=torch.tensor(second, dtype=torch.long),
        prefer_first=torch.tensor(prefer),
        weight=torch.tensor(weight),
        margin=torch.tensor(margin),
        example=torch.tensor([index for index, _ in examples]),
        token_share=torch.tensor(trees.target.numel() / n_tokens),
    )
