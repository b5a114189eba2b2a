"""PPO's policy between updates: on held-out prompts, and its distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.engine.distributed import all_items, world
from toolkit.engine.logps import by_response
from toolkit.engine.tree import TreeBatch
from toolkit.models.encoding import Tree
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import PPOModels
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.sampling import SamplingSettings, Scorer, sample, sample_share
from toolkit.ppo.schedule import Schedule
from toolkit.training.milestones import RESPONSES


def evaluate_policy(
    models: PPOModels, prompts: Sequence[PromptIds], config: PPOConfig, score: Scorer, sampling: SamplingSettings
) -> dict[str, float]:
    """Sample each prompt once: means over prompts of score, KL to the reference (nats per response), length and
    end-of-text rate. ``prompts`` are those of all processes."""
    rank, size = world()
    share = prompts[rank::size]
    responses = sample(
        models,
        share,
        lambda i, _: (sampling.seed, "eval", share[i].prompt_id),
        config,
        sampling,
        n=1,
        batch_size=config.per_device_eval_batch_size,
    )
    scores = score(responses, models, sampling.dtype).totals()
    kl = log_ratios(models, responses.trees, config.temperature)
    lengths = [len(ids) for ids in responses.completion_ids]
    ended = [not truncated for truncated in responses.truncated]
    # In an order that does not depend on the processes, so that the sums do not either.
    rows = sorted(all_items(list(zip(scores, kl, lengths, ended, strict=True))))
    names = ("objective/score", "objective/kl", "length/mean", "eos_rate")
    return {name: sum(float(row[i]) for row in rows) / len(rows) for i, name in enumerate(names)}


def log_ratios(models: PPOModels, trees: list[Tree], temperature: float) -> list[float]:
    """log pi / pi_ref of each response of the trees, in nats."""

    def of_batch(batch: TreeBatch) -> list[float]:
        logps_N, _ = models.policy_logps(batch, temperature)
        ratios_N = logps_N - models.reference_logps(batch, temperature)
        ratios: list[float] = by_response(ratios_N.double(), batch).tolist()
        return ratios

    with models.whole("policy", "reference"):
        return [ratio for ratios in models.engine.map_responses(trees, of_batch) for ratio in ratios]


def milestone_log_ratios(
    models: PPOModels, schedule: Schedule, config: PPOConfig, sampling: SamplingSettings
) -> torch.Tensor:
    """[R] log pi / pi_ref of the samples that a KL milestone is measured on, of all processes."""
    positions, responses = sample_share(models, schedule, config, sampling, RESPONSES, "milestone")
    ratios = log_ratios(models, responses.trees, config.temperature)
    gathered = all_items(list(zip(positions, ratios, strict=True)))
    return torch.tensor([ratio for _, ratio in sorted(gathered)], dtype=torch.float64)
