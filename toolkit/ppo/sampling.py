"""From prompts to responses of the policy, and to their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.engine.distributed import all_items, world
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import ModelError
from toolkit.models.encoding import TextEncoder, Tree, is_conversation
from toolkit.models.inspect import precision
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import PPOModels
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import EnsembleScores, Responses, RewardFunction, Scores, weighted_sum
from toolkit.ppo.schedule import Schedule


@dataclass(frozen=True)
class SamplingSettings:
    """What sampling and scoring need beside the models and ``PPOConfig``.

    ``eos_ids`` end a response; ``dtype`` is the precision of every forward pass; ``seed`` is that of all samples.
    """

    tokenizer: Any
    eos_ids: Sequence[int]
    dtype: torch.dtype
    seed: int


def sample(
    models: PPOModels,
    prompts: Sequence[PromptIds],
    key: Callable[[int, int], Sequence[object]],
    config: PPOConfig,
    sampling: SamplingSettings,
    *,
    n: int,
    batch_size: int,
) -> Responses:
    """The policy's responses, ``n`` for each prompt; ``key(i, k)`` seeds the k-th of the i-th prompt."""
    models.eval()
    models.use_policy()
    with models.whole("policy"):
        groups = sample_responses(
            models.policy,
            sampling.tokenizer,
            [prompt.ids for prompt in prompts],
            key,
            SamplingParams(config.response_length, config.temperature, n, batch_size, sampling.eos_ids),
            dtype=sampling.dtype,
        )
    samples = [response for group in groups for response in group]
    prompt_of = [prompt for prompt in prompts for _ in range(n)]
    encoder = TextEncoder(sampling.tokenizer, bool(prompts) and is_conversation(prompts[0].prompt))
    column_names = prompts[0].columns if prompts else {}
    return Responses(
        prompts=[prompt.prompt for prompt in prompt_of],
        completions=[encoder.decode(response.ids) for response in samples],
        truncated=[response.truncated for response in samples],
        trees=[Tree(p.ids, [response.ids for response in group]) for p, group in zip(prompts, groups, strict=True)],
        columns={name: [prompt.columns[name] for prompt in prompt_of] for name in column_names},
        sampler_logps=[response.logp for response in samples],
    )


def sample_share(
    models: PPOModels, schedule: Schedule, config: PPOConfig, sampling: SamplingSettings, n: int, purpose: str
) -> tuple[range, Responses]:
    """This process's share of ``n`` responses to the schedule's first prompts, and their positions in the schedule.

    ``purpose`` is a part of their seeds, so that what is sampled for different purposes differs.
    """
    rank, size = world()
    positions = range(rank, n, size)
    prompts = [schedule.prompt_at(position) for position in positions]
    responses = sample(
        models,
        prompts,
        lambda i, _: (sampling.seed, purpose, positions[i], prompts[i].prompt_id),
        config,
        sampling,
        n=1,
        batch_size=config.per_device_train_batch_size,
    )
    return positions, responses


class Scorer:
    """Scores responses: the weighted sum of the rewards, minus a mean that centres them.

    ``mean`` is None until :meth:`center` has measured it.
    """

    def __init__(self, rewards: Sequence[RewardFunction], weights: Sequence[float], mean: float | None = 0.0) -> None:
        self.rewards, self.weights, self.mean = rewards, weights, mean

    @torch.no_grad()
    def __call__(self, responses: Responses, models: PPOModels, dtype: torch.dtype) -> Scores:
        """Scores under the autocast of training. Raises ModelError where one is not finite."""
        with models.whole("reward"), precision(models.engine.device, dtype):
            results = [reward(responses) for reward in self.rewards] if responses.completions else []
        if not results:
            return Scores([], [])
        total = weighted_sum(results, self.weights)
        ensembles = [scores.disagreement for scores in results if isinstance(scores, EnsembleScores)]
        for text, value, steps in zip(responses.completions, total.values, total.steps, strict=True):
            if not math.isfinite(value) or not all(math.isfinite(step) for _, step in steps):
                what = "no reward applies to a response" if math.isnan(value) else "a reward is not finite"
                where = f"the response {text[:80]!r}"
                raise ModelError(what, where=where, fix="check the rewards; None means no reward")
        disagreement = [sum(of_response) / len(ensembles) for of_response in zip(*ensembles, strict=True)]
        return Scores([value - (self.mean or 0.0) for value in total.values], total.steps, disagreement)

    def center(self, models: PPOModels, schedule: Schedule, config: PPOConfig, sampling: SamplingSettings) -> None:
        """Measure the mean score of ``center_samples`` responses of the policy, unless it is known already."""
        if self.mean is not None:
            return
        _, responses = sample_share(models, schedule, config, sampling, config.center_samples, "centre")
        scores = self(responses, models, sampling.dtype)
        self.mean = math.fsum(all_items(scores.values)) / config.center_samples
