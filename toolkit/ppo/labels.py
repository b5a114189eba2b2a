"""Scores for comparisons of sampled responses: by a reward model, the gold reward, or a function."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.judging.options import JudgeOptions
from toolkit.judging.responses import SampledIds
from toolkit.judging.scorers import score
from toolkit.models.inspect import best_device, precision, torch_dtype
from toolkit.ppo.rewards import Responses, reward_functions
from toolkit.recipe.training import ModelSection
from toolkit.training.online import Labels, SampledPrompts


def labels_by(
    spec: str, reward_model: Path | None, policy_tokenizer: PreTrainedTokenizerBase, section: ModelSection
) -> Labels:
    """What ``dpo.online.labels`` names: ``rm``, which is ``reward_model``; ``rm:MODEL``; ``gold``; ``python:M:F``.

    A reward model reads the ids that were sampled, so that a truncated response has the score of a text without an end.
    Raises ModelError for a model that cannot score.
    """
    kind, _, name = spec.partition(":")
    if kind != "rm":
        return _by_judge(spec, section)
    [reward] = reward_functions(name or str(reward_model), policy_tokenizer, section, best_device())

    @torch.no_grad()
    def by_reward_model(sampled: SampledPrompts) -> list[list[float]]:
        responses = Responses(
            [prompt for prompt, texts in zip(sampled.prompts, sampled.texts, strict=True) for _ in texts],
            [text for texts in sampled.texts for text in texts],
            [cut for of_prompt in sampled.truncated for cut in of_prompt],
            sampled.trees,
        )
        with precision(best_device(), torch_dtype(section.dtype)):
            scores = iter(reward(responses))
        return [[float(next(scores)) for _ in texts] for texts in sampled.texts]  # type: ignore[arg-type]

    return by_reward_model


def _by_judge(spec: str, section: ModelSection) -> Labels:
    options = JudgeOptions(section)

    def by_judge(sampled: SampledPrompts) -> list[list[float]]:
        ids = [SampledIds(tree.response_ids, cut) for tree, cut in zip(sampled.trees, sampled.truncated, strict=True)]
        return score(spec, sampled.prompts, sampled.texts, options, ids)

    return by_judge
