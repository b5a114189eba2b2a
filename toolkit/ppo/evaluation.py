"""PPO's policy on held-out prompts, between updates."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.engine.distributed import all_items, world
from toolkit.engine.logps import by_response
from toolkit.engine.tree import TreeBatch
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import PPOModels
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.sampling import SamplingSettings, Scorer, sample


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
    scores = score(responses, models.engine.device, sampling.dtype).totals()

    def kl_of(batch: TreeBatch) -> list[float]:
        logps_N, _ = models.policy_logps(batch, config.temperature)
        log_ratio_N = logps_N - models.reference_logps(batch, config.temperature)
        kl: list[float] = by_response(log_ratio_N.double(), batch).tolist()
        return kl

    kl = [value for values in models.engine.map_responses(responses.trees, kl_of) for value in values]
    lengths = [len(ids) for ids in responses.completion_ids]
    ended = [not truncated for truncated in responses.truncated]
    # In an order that does not depend on the processes, so that the sums do not either.
    rows = sorted(all_items(list(zip(scores, kl, lengths, ended, strict=True))))
    names = ("objective/score", "objective/kl", "length/mean", "eos_rate")
    return {name: sum(float(row[i]) for row in rows) / len(rows) for i, name in enumerate(names)}
