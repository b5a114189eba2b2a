"""Training on comparisons of the policy's own samples (online DPO: Guo et al. 2024, arXiv 2402.04792).

Before each batch is trained on, the current policy answers its prompts, the responses get scores, and every two
responses of a prompt with unequal scores make a comparison. The loss is that of training on recorded comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SampledResponse, SamplingParams, sample_responses
from toolkit.errors import NotFiniteError
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.preferences.rows import PreferenceRow, Prompt
from toolkit.training.batch import Example, PairBatch
from toolkit.training.budget import Budget, Spending
from toolkit.training.trainer import EngineTrainer


@dataclass(frozen=True)
class SampledPrompts:
    """Prompts with K sampled responses each: as token ids, as text, and which were cut at the length limit."""

    prompts: list[Prompt]
    trees: list[Tree]
    texts: list[list[str]]
    truncated: list[list[bool]]


# The score of each response.
Labels = Callable[[SampledPrompts], list[list[float]]]
OnlineLoss = Callable[[list[torch.Tensor], PairBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class OnlineData:
    """What to sample, and how it is labelled.

    ``reference`` gives, for each tree, [K] log-probabilities of its responses under the reference. ``seed`` is that of
    the samples. ``log_kl`` adds the estimate of the KL to the reference to the log.
    """

    rows: Sequence[PreferenceRow]
    encoder: TextEncoder
    params: SamplingParams
    labels: Labels
    reference: Callable[[list[Tree]], list[torch.Tensor]]
    seed: int
    dtype: torch.dtype
    log_kl: bool = True


def comparisons(scores: Sequence[float]) -> list[tuple[int, int, float, float]]:
    """Every two responses with unequal scores, as the pairs of :class:`toolkit.training.batch.Example`.

    >>> comparisons([0.5, 2.0, 0.5])
    [(0, 1, 0.0, 1.0), (1, 2, 1.0, 1.0)]
    """
    unequal = [(i, j) for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j]]
    return [(i, j, float(scores[i] > scores[j]), 1.0) for i, j in unequal]


class OnlineTrainer(EngineTrainer):
    """An :class:`EngineTrainer` that samples and labels the comparisons of each batch.

    A sample's seed is made of the recipe's seed, the optimiser step, the prompt, and the number of the sample. So
    neither resume nor the number of processes changes it. ``loss(reference, microbatch)`` gets, for each prompt of the
    batch, the log-probabilities of its responses under the reference.
    """

    def __init__(
        self,
        engine: Engine,
        arguments: dict[str, Any],
        data: OnlineData,
        loss: OnlineLoss,
        callbacks: list[TrainerCallback] | None = None,
        spending: Spending | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.data = data
        self.reference: list[torch.Tensor] = []  # of the prompts of the current step, counted through its batches
        examples = prompts_alone(data.rows, data.encoder)
        super().__init__(
            engine, arguments, examples, lambda batch: loss(self.reference, batch), callbacks, spending, budget
        )

    def step_examples(self, batches: list[list[tuple[int, Example]]]) -> list[list[tuple[int, Example]]]:
        self.reference, first = [], 0
        sampled = []
        for batch in batches:
            numbers = [number for number, _ in batch]
            sampled.append(list(enumerate(self.sampled_examples(numbers) if numbers else [], first)))
            first += len(numbers)
        return sampled

    @torch.no_grad()
    def sampled_examples(self, numbers: Sequence[int]) -> list[Example]:
        """The comparisons of these prompts' new samples. Raises NotFiniteError for a score that is not finite."""
        data, step = self.data, self.state.global_step
        rows = [data.rows[number] for number in numbers]
        self.engine.model.eval()  # with gradient checkpointing, training mode has no cache; the step sets it again
        groups = sample_responses(
            self.engine.model,
            data.encoder.tokenizer,
            [self.examples[number].tree.prompt_ids for number in numbers],
            lambda i, k: (data.seed, "online", step, rows[i].prompt_id, k),
            data.params,
            dtype=data.dtype,
        )
        sampled = self._sampled_prompts(rows, numbers, groups)
        scores = data.labels(sampled)
        scores_R = torch.tensor([score for of_prompt in scores for score in of_prompt], dtype=torch.float64)
        if not scores_R.isfinite().all():
            raise NotFiniteError("a label of a sampled response is not finite", where=f"step {step + 1}")
        reference = data.reference(sampled.trees)
        self.reference += reference
        self.values["objective/score"].append(scores_R)
        if data.log_kl:
            logps_R = torch.tensor([response.logp for group in groups for response in group], dtype=torch.float64)
            self.values["objective/kl"].append(logps_R - torch.cat(reference).double().cpu())
        return [Example(tree, comparisons(of)) for tree, of in zip(sampled.trees, scores, strict=True)]

    def _sampled_prompts(
        self, rows: Sequence[PreferenceRow], numbers: Sequence[int], groups: Sequence[Sequence[SampledResponse]]
    ) -> SampledPrompts:
        prompt_ids = [self.examples[number].tree.prompt_ids for number in numbers]
        return SampledPrompts(
            [row.prompt for row in rows],
            [Tree(ids, [sample.ids for sample in group]) for ids, group in zip(prompt_ids, groups, strict=True)],
            [[self.data.encoder.decode(sample.ids) for sample in group] for group in groups],
            [[sample.truncated for sample in group] for group in groups],
        )


def prompts_alone(rows: Sequence[PreferenceRow], encoder: TextEncoder) -> list[Example]:
    """Examples without responses, one for each row."""
    return [Example(Tree(encoder.prompt(row.prompt), []), ()) for row in rows]
