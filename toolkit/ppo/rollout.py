"""One rollout: sample, score, and lay out everything that the updates need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit import models
from toolkit.generation import generate
from toolkit.ppo import objective
from toolkit.ppo.actors import Actors
from toolkit.recipe import PpoSection
from toolkit.scoring import Tree, TreeBatch


@dataclass(frozen=True)
class PromptIds:
    """A prompt to sample from. ``prompt_id`` seeds its samples."""

    prompt_id: str
    ids: list[int]


@dataclass(frozen=True)
class Part:
    """A packed piece of a minibatch with its dense targets, each [S_part, T]."""

    batch: TreeBatch
    mask_ST: torch.Tensor
    old_logps_ST: torch.Tensor
    old_values_ST: torch.Tensor
    advantages_ST: torch.Tensor
    returns_ST: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """``minibatches[m]`` are the parts of minibatch m; their packing is the one that the old log-probabilities had."""

    index: int
    minibatches: list[list[Part]]
    metrics: dict[str, float]
    samples: list[tuple[list[int], list[int], float]]  # prompt ids, response ids, score


def dense(values_N: torch.Tensor, batch: TreeBatch, width: int) -> torch.Tensor:
    """[R, width] from [N]: each response's values from the left, zeros behind."""
    lengths_R = torch.bincount(batch.owner, minlength=batch.n_responses)
    first_R = lengths_R.cumsum(0) - lengths_R
    column_N = torch.arange(batch.owner.numel(), device=batch.owner.device) - first_R[batch.owner]
    out = torch.zeros(batch.n_responses, width, dtype=values_N.dtype, device=values_N.device)
    return out.index_put((batch.owner, column_N), values_N)


def split_evenly(n: int, parts: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition of range(n) into ``parts`` lists whose sizes differ by one at most."""
    order = torch.randperm(n, generator=generator).tolist()
    return [order[m::parts] for m in range(parts)]


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Sequence[PromptIds],
    section: PpoSection,
    *,
    index: int,
    seed: int,
    kl_coef: float,
    response_length: int,
    eos_ids: Sequence[int],
    pad_id: int,
    dtype: torch.dtype,
    token_budget: int,
) -> Rollout:
    """Sample ``samples_per_prompt`` responses for each prompt and compute rewards, advantages and returns."""
    k = section.samples_per_prompt
    actors.eval()
    actors.use_policy()
    samples = generate(
        actors.policy,
        [p.ids for p in prompts for _ in range(k)],
        [(seed, "rollout", index, position, p.prompt_id, j) for position, p in enumerate(prompts) for j in range(k)],
        max_new_tokens=response_length,
        temperature=section.temperature,
        eos_ids=eos_ids,
        pad_id=pad_id,
        dtype=dtype,
        batch_size=section.per_device_train_batch_size,
    )
    trees = [Tree(p.ids, [s.ids for s in samples[i * k : (i + 1) * k]]) for i, p in enumerate(prompts)]
    width = max(len(s.ids) for s in samples)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    # The packs are made once: the first pass of an update then repeats the very computation of the old
    # log-probabilities, and its ratio is exactly 1.
    device = next(actors.parameters()).device
    packs: list[tuple[int, list[int], TreeBatch]] = []
    for minibatch, chosen in enumerate(split_evenly(len(trees), section.num_mini_batches, generator)):
        chosen.sort(key=lambda i: (-len(trees[i]), i))
        start = 0
        while start < len(chosen):
            rows = max(1, token_budget // len(trees[chosen[start]]))
            part = chosen[start : start + rows]
            packs.append((minibatch, part, actors.engine.pack([trees[i] for i in part]).to(device)))
            start += rows

    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("mask", "logps", "ref", "values", "entropy", "scores", "cut")
    }
    with models.precision(device, dtype):
        for _, part, batch in packs:
            logps_N, entropy_N = actors.policy_logps(batch, section.temperature, with_entropy=True)
            assert entropy_N is not None
            columns["logps"].append(dense(logps_N, batch, width))
            columns["entropy"].append(dense(entropy_N, batch, width))
            columns["ref"].append(dense(actors.reference_logps(batch, section.temperature), batch, width))
            columns["values"].append(dense(actors.values(batch), batch, width))
            columns["scores"].append(actors.scores(batch))
            columns["mask"].append(dense(torch.ones_like(logps_N), batch, width) > 0)
            columns["cut"].append(
                torch.tensor([samples[i * k + j].truncated for i in part for j in range(k)], device=device)
            )
    logps, ref, values, entropy = (torch.cat(columns[name]) for name in ("logps", "ref", "values", "entropy"))
    mask, raw_scores, truncated = (torch.cat(columns[name]) for name in ("mask", "scores", "cut"))

    scores = objective.shape_scores(
        raw_scores, truncated, clip=section.reward_clip, missing_eos_penalty=section.missing_eos_penalty
    )
    kl = objective.kl_tokens(logps, ref, section.kl_estimator)
    rewards = objective.token_rewards(kl, scores, mask, kl_coef)
    if section.whiten_rewards:
        rewards = objective.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = objective.gae(rewards, values, mask, gamma=section.gamma, lam=section.lam)
    if section.whiten_advantages:
        advantages = objective.masked_whiten(advantages, mask)

    minibatches: list[list[Part]] = [[] for _ in range(section.num_mini_batches)]
    start = 0
    for minibatch, _, batch in packs:
        rows_ = slice(start, start + batch.n_responses)
        minibatches[minibatch].append(
            Part(batch, mask[rows_], logps[rows_], values[rows_], advantages[rows_], returns[rows_])
        )
        start += batch.n_responses

    lengths = mask.sum(1).float()
    k1, k3 = objective.kl_tokens(logps, ref, "k1"), objective.kl_tokens(logps, ref, "k3")
    unexplained = objective.masked_var(returns - values, mask) / objective.masked_var(returns, mask).clamp(min=1e-8)
    quantiles = torch.quantile(raw_scores, torch.tensor([0.1, 0.5, 0.9], device=device)).tolist()
    metrics = {
        "objective/kl": torch.where(mask, k1, 0.0).sum(1).mean().item(),
        "objective/kl_k3": torch.where(mask, k3, 0.0).sum(1).mean().item(),
        "objective/entropy": objective.masked_mean(entropy, mask).item(),
        "objective/score": raw_scores.mean().item(),
        "objective/score_shaped": scores.mean().item(),
        "objective/rlhf_reward": rewards.sum(1).mean().item(),
        "objective/kl_coef": kl_coef,
        **{f"objective/score_q{q}": value for q, value in zip((10, 50, 90), quantiles, strict=True)},
        "value/explained_variance": 1 - unexplained.item(),
        "length/mean": lengths.mean().item(),
        "eos_rate": 1 - truncated.float().mean().item(),
        "tokens": float(lengths.sum().item()),
    }
    order = [i for _, part, _ in packs for i in part]
    flat_scores = iter(raw_scores.tolist())
    shown = [(prompts[i].ids, samples[i * k + j].ids, next(flat_scores)) for i in order for j in range(k)]
    return Rollout(index, minibatches, metrics, shown)
