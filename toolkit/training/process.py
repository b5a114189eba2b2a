"""Training a process reward model: whether a step is right, read at its last token (Uesato et al. 2022, 2211.14275)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.engine.distributed import all_sum
from toolkit.engine.engine import Engine
from toolkit.engine.process import StepTree, token_scores
from toolkit.engine.tree import TreeBatch
from toolkit.errors import DataError
from toolkit.preferences.solutions import Solution
from toolkit.training.batch import Example
from toolkit.training.trainer import EngineTrainer


@dataclass(frozen=True)
class StepExample(Example):
    """A prompt with solutions. ``labels`` are (response, position of a step's last token, whether it is right)."""

    labels: Sequence[tuple[int, int, bool]] = ()


@dataclass(frozen=True)
class StepBatch:
    """A microbatch with all its labelled steps, S in all. ``weight`` is one over those of the optimiser step."""

    trees: TreeBatch
    token: torch.Tensor  # [S] which of the batch's response tokens ends the step
    right: torch.Tensor  # [S] 1 or 0
    weight: torch.Tensor  # [S]

    def to(self, device: torch.device) -> StepBatch:
        return StepBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def step_examples(trees: Sequence[StepTree], solutions: Sequence[Solution]) -> list[StepExample]:
    """The trees that have a labelled step, each label once. Raises DataError where all labels are the same."""
    examples = []
    for tree in trees:
        labels = []
        for response, (number, ends) in enumerate(zip(tree.solutions, tree.ends, strict=True)):
            solution = solutions[number]
            of_steps = solution.labels[solution.n_shared :][: len(ends)]
            labels += [(response, end, label) for end, label in zip(ends, of_steps, strict=True) if label is not None]
        if labels:
            examples.append(StepExample(tree.tree, (), labels=labels))
    if len({right for example in examples for *_, right in example.labels}) < 2:
        raise DataError(
            "the steps to train on are not both right and wrong, so there is nothing to tell apart",
            where="reward_model.steps",
            fix="name data with labels of both kinds, or raise data.max_response_tokens if it cuts the wrong ones",
        )
    return examples


def step_loss(engine: Engine, batch: StepBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The binary cross-entropy of the labels, averaged over the labelled steps of the optimiser step, and metrics."""
    logits = token_scores(engine, batch.trees)[batch.token]
    losses = F.binary_cross_entropy_with_logits(logits, batch.right, reduction="none")
    with torch.no_grad():
        hit = ((logits >= 0) == (batch.right > 0.5)).float()
        metrics = {"accuracy": hit, "accuracy_wrong_steps": hit[batch.right < 0.5], "mean_reward": logits.sigmoid()}
    return (batch.weight * losses).sum(), metrics


class StepTrainer(EngineTrainer):
    """:class:`EngineTrainer` on :class:`StepExample`."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The batches of an optimiser step, packed, and its labelled steps over all processes."""
        inputs, _ = super(EngineTrainer, self).get_batch_samples(epoch_iterator, num_batches, device)
        batches = [[example for _, example in each["batch"]] for each in inputs]
        n_labels = sum(len(example.labels) for batch in batches for example in batch)
        total = int(all_sum(torch.tensor([n_labels], device=self.args.device))[0])
        return [{"batch": step_batches(self.engine, batch, total)} for batch in batches], total


def step_batches(engine: Engine, examples: Sequence[StepExample], total: int) -> list[StepBatch]:
    """The microbatches of a batch, each within the engine's token budget. ``total`` are the optimiser step's labels."""
    batches = []
    for indices in engine.batches([example.tree for example in examples]):
        members = [examples[i] for i in sorted(indices)]
        tokens, right, start = [], [], 0
        for example in members:
            starts = [start]
            for ids in example.tree.response_ids:
                starts.append(starts[-1] + len(ids))
            tokens += [starts[response] + position for response, position, _ in example.labels]
            right += [float(label) for *_, label in example.labels]
            start = starts[-1]
        batch = StepBatch(
            trees=engine.pack([example.tree for example in members]),
            token=torch.tensor(tokens),
            right=torch.tensor(right),
            weight=torch.full((len(right),), 1.0 / max(1, total)),
        )
        batches.append(batch.to(engine.device))
    return batches
