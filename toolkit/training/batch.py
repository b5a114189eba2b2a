"""Training examples, and batches of them: packed trees with their comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from toolkit.engine.distributed import all_sum
from toolkit.engine.engine import Engine
from toolkit.engine.tree import TreeBatch
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow


@dataclass(frozen=True)
class Example:
    """One prompt for a comparison loss. ``pairs`` are (i, j, share of the weight that prefers i, weight).

    ``margins`` has, for each pair, by how much the preferred reward should be higher; it is empty where the data does
    not say. ``outputs`` has the number of the output that each pair trains; it is empty where all train on all.
    """

    tree: Tree
    pairs: Sequence[tuple[int, int, float, float]]
    margins: tuple[float, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def n_with_winner(self) -> int:
        """How many of the pairs are no ties."""
        return sum(p != 0.5 for *_, p, _ in self.pairs)


@dataclass(frozen=True)
class PairBatch:
    """A microbatch: packed prompts with all their comparisons, P in all, that are computed at once.

    Each prompt's weights add up to 1 / prompts of the whole optimiser step. So weighted sums, added over the step's
    microbatches, are the mean over prompts of the mean over comparisons (Ouyang et al. 2022, equation 1).
    """

    trees: TreeBatch
    first: torch.Tensor  # [P] response i
    second: torch.Tensor  # [P] response j
    prefer_first: torch.Tensor  # [P] in [0, 1]
    weight: torch.Tensor  # [P]
    margin: torch.Tensor  # [P] by how much the preferred reward should be higher
    example: torch.Tensor  # [n_prompts] which of the stage's examples each prompt is
    token_share: torch.Tensor  # [] this microbatch's share of the optimiser step's response tokens
    output: torch.Tensor | None = None  # [P] the output that a comparison trains; None: all outputs

    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the D comparisons with a winner: [D] chosen and [D] rejected responses."""
        sign = torch.sign(self.prefer_first - 0.5)
        chosen, rejected = (
            torch.where(sign > 0, self.first, self.second),
            torch.where(sign > 0, self.second, self.first),
        )
        return chosen[sign != 0], rejected[sign != 0]

    def to(self, device: torch.device) -> PairBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PairBatch(**{name: value.to(device) for name, value in values.items() if value is not None})


def examples_of(rows: Sequence[PreferenceRow], encoder: TextEncoder, max_response_tokens: int) -> list[Example]:
    """Rows as token ids; those without any comparison are left out."""
    examples = []
    for row in rows:
        pairs = splits.pairs(row)
        if pairs:
            tree = encoder.encode(row.prompt, row.responses, max_response_tokens).tree
            examples.append(Example(tree, pairs, tuple(splits.margins(row))))
    return examples


@dataclass(frozen=True)
class StepTotals:
    """Prompts and response tokens of an optimiser step, by which its losses are divided."""

    n_prompts: int
    n_tokens: int

    @staticmethod
    def of(examples: Iterable[tuple[int, Example]]) -> StepTotals:
        """Those of numbered examples."""
        n_tokens = [sum(map(len, example.tree.response_ids)) for _, example in examples]
        return StepTotals(len(n_tokens), sum(n_tokens))

    def over_processes(self, device: torch.device) -> StepTotals:
        """The sums of all processes."""
        return StepTotals(*map(int, all_sum(torch.tensor([self.n_prompts, self.n_tokens], device=device)).tolist()))


def collate(
    engine: Engine, examples: Sequence[tuple[int, Example]], totals: StepTotals | None = None
) -> dict[str, list[PairBatch]]:
    """Pack numbered examples into the microbatches of one batch, on the engine's device, under the key ``batch``.

    Each fits the engine's token budget. How many prompts make a step is statistics, how many are computed at once is
    hardware: the gradients are the same, and the memory is that of a microbatch. ``totals`` are those of the optimiser
    step that the batch is a part of; None means that it is the whole step.
    """
    totals = totals or StepTotals.of(examples)
    microbatches = []
    for indices in engine.batches([example.tree for _, example in examples]):
        members = [examples[i] for i in sorted(indices)]
        microbatches.append(_pair_batch(engine, members, totals).to(engine.device))
    return {"batch": microbatches}


def _pair_batch(engine: Engine, examples: Sequence[tuple[int, Example]], totals: StepTotals) -> PairBatch:
    """A microbatch of an optimiser step that has these totals."""
    first: list[int] = []
    second: list[int] = []
    prefer_first: list[float] = []
    weight: list[float] = []
    margin: list[float] = []
    output: list[int] = []
    offset = 0
    for _, example in examples:
        total = sum(w for *_, w in example.pairs)
        for i, j, p, w in example.pairs:
            first.append(offset + i)
            second.append(offset + j)
            prefer_first.append(p)
            weight.append(w / total / totals.n_prompts)
        output += example.outputs
        margin += example.margins or (0.0,) * len(example.pairs)
        offset += len(example.tree.response_ids)
    trees = engine.pack([example.tree for _, example in examples])
    return PairBatch(
        trees=trees,
        first=torch.tensor(first, dtype=torch.long),
        second=torch.tensor(second, dtype=torch.long),
        prefer_first=torch.tensor(prefer_first),
        weight=torch.tensor(weight),
        margin=torch.tensor(margin),
        example=torch.tensor([index for index, _ in examples]),
        token_share=torch.tensor(trees.target.numel() / totals.n_tokens),
        output=torch.tensor(output) if output else None,
    )
