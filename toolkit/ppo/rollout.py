"""One rollout: sample, score, and lay out everything that the updates need.

A rollout is one set of prompts whatever the number of processes: its samples are seeded by their place in it, its
minibatches are drawn for all processes together, and each process computes a share of every minibatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.engine.distributed import all_items, all_sum, world
from toolkit.engine.sampling import SampledResponse, SamplingParams, sample_responses
from toolkit.engine.tree import TreeBatch
from toolkit.errors import ModelError
from toolkit.models.encoding import TextEncoder, Tree, is_conversation
from toolkit.models.inspect import precision
from toolkit.ppo import objective
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import Actors
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import Sampled, Steps

# Tokens of a forward and backward pass by default. More than scoring has: what a pass costs beside its products counts
# twice, and rows of 20 and 12 took a tenth longer than 32 in one pass (SmolLM2-135M, 50 tokens each, 2 cores).
PASS_TOKENS = {"cpu": 2048, "cuda": 4096}

# Scores, and steps of a process reward, of a rollout's responses in their order.
Score = Callable[[Sampled], tuple[list[float], list[Steps]]]


@dataclass(frozen=True)
class Generator:
    """What sampling needs beside the model."""

    tokenizer: Any
    eos_ids: Sequence[int]
    dtype: torch.dtype
    seed: int


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
    """This process's share. ``minibatches[m]`` are the parts of minibatch m, packed as the old log-probabilities were;
    ``metrics`` are of all processes together; ``table`` has one row per response of this process."""

    index: int
    minibatches: list[list[Part]]
    metrics: dict[str, float]
    table: list[dict[str, Any]]


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


def sample(
    actors: Actors,
    prompts: Sequence[PromptIds],
    keys: Sequence[Sequence[object]],
    config: PPOConfig,
    how: Generator,
    n_samples: int,
    batch_size: int,
) -> tuple[list[SampledResponse], Sampled]:
    """``n_samples`` responses for each prompt, ``keys`` one for each response."""
    actors.eval()
    actors.use_policy()
    groups = sample_responses(
        actors.policy,
        how.tokenizer,
        [p.ids for p in prompts],
        lambda i, k: keys[i * n_samples + k],
        SamplingParams(config.response_length, config.temperature, n_samples, batch_size, how.eos_ids),
        dtype=how.dtype,
    )
    samples = [sample for group in groups for sample in group]
    each = [p for p in prompts for _ in range(n_samples)]
    names = prompts[0].columns if prompts else {}
    encoder = TextEncoder(how.tokenizer, bool(prompts) and is_conversation(prompts[0].prompt))
    sampled = Sampled(
        prompts=[p.prompt for p in each],
        completions=[encoder.decode(s.ids) for s in samples],
        truncated=[s.truncated for s in samples],
        trees=[Tree(p.ids, [s.ids for s in group]) for p, group in zip(prompts, groups, strict=True)],
        columns={name: [p.columns[name] for p in each] for name in names},
    )
    return samples, sampled


def scored(score: Score, sampled: Sampled) -> tuple[list[float], list[Steps]]:
    """Scores and steps of the responses. Raises ModelError where there is no finite one."""
    if not sampled.completions:
        return [], []
    scores, steps = score(sampled)
    for text, value, found in zip(sampled.completions, scores, steps, strict=True):
        if not math.isfinite(value) or not all(math.isfinite(step) for _, step in found):
            what = "no reward applies to a response" if math.isnan(value) else "a reward is not finite"
            raise ModelError(what, where=f"the response {text[:80]!r}", fix="check the rewards; None means no reward")
    return scores, steps


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Sequence[PromptIds],
    config: PPOConfig,
    score: Score,
    how: Generator,
    *,
    index: int,
    kl_coef: float,
    passes: int = 1,
) -> Rollout:
    """Sample ``samples_per_prompt`` responses for each prompt and compute rewards, advantages and returns.

    ``prompts`` are those of all processes; a minibatch is computed in about ``passes`` parts at least.
    """
    k = config.samples_per_prompt
    rank, size = world()
    generator = torch.Generator().manual_seed(how.seed * 1_000_003 + index)
    minibatch_prompts = [part[rank::size] for part in split_evenly(len(prompts), config.num_mini_batches, generator)]
    places = [place for part in minibatch_prompts for place in part]  # of this process's prompts in the rollout
    own = [prompts[place] for place in places]
    keys = [(how.seed, "rollout", index, place, prompts[place].prompt_id, j) for place in places for j in range(k)]
    began = time.perf_counter()
    samples, sampled = sample(actors, own, keys, config, how, k, config.per_device_train_batch_size)
    generated = time.perf_counter()
    device = next(actors.parameters()).device
    with precision(device, how.dtype):
        own_scores, own_steps = scored(score, sampled)

    # The packs are made once: the first pass of an update then repeats the very computation of the old
    # log-probabilities, and its ratio is exactly 1.
    trees = sampled.trees
    width = max((len(s.ids) for s in samples), default=1)
    packs: list[tuple[int, list[int], TreeBatch]] = []
    first = 0
    for minibatch, part in enumerate(minibatch_prompts):
        budget = config.token_budget or PASS_TOKENS[device.type]
        of_part = trees[first : first + len(part)]
        if passes > 1:
            budget = min(budget, -(-sum(len(tree.inputs(last_tokens=False)) for tree in of_part) // passes))
        for chosen in actors.engine.batches(of_part, budget):
            indices = [first + i for i in chosen]
            packs.append((minibatch, indices, actors.engine.pack([trees[i] for i in indices]).to(device)))
        first += len(part)

    columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("mask", "logps", "ref", "values", "entropy")}
    with precision(device, how.dtype):
        for _, _, batch in packs:
            logps_N, entropy_N, values_N = actors.logps_and_values(batch, config.temperature, with_entropy=True)
            assert entropy_N is not None
            columns["logps"].append(dense(logps_N, batch, width))
            columns["entropy"].append(dense(entropy_N, batch, width))
            columns["ref"].append(dense(actors.reference_logps(batch, config.temperature), batch, width))
            columns["values"].append(dense(values_N, batch, width))
            columns["mask"].append(dense(torch.ones_like(logps_N), batch, width) > 0)
    empty = torch.zeros(0, width, device=device)
    logps, ref, values, entropy, mask = (
        torch.cat([empty.bool() if name == "mask" else empty, *columns[name]])
        for name in ("logps", "ref", "values", "entropy", "mask")
    )
    # From here on rows are in the order of the packs.
    order = [i * k + j for _, part, _ in packs for i in part for j in range(k)]
    raw_scores = torch.tensor([own_scores[i] for i in order], device=device)
    truncated = torch.tensor([samples[i].truncated for i in order], dtype=torch.bool, device=device)
    steps = [own_steps[i] for i in order]

    scores = objective.shape_scores(
        raw_scores, truncated, clip=config.reward_clip, missing_eos_penalty=config.missing_eos_penalty
    )
    kl = objective.kl_tokens(logps, ref, config.kl_estimator)
    rewards = objective.add_steps(objective.token_rewards(kl, scores, mask, kl_coef), steps)
    if config.whiten_rewards:
        rewards = objective.masked_whiten(rewards, mask, shift_mean=False, over=all_sum)
    advantages, returns = objective.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = objective.masked_whiten(advantages, mask, over=all_sum)

    minibatches: list[list[Part]] = [[] for _ in range(config.num_mini_batches)]
    start = 0
    for minibatch, _, batch in packs:
        rows_ = slice(start, start + batch.n_responses)
        minibatches[minibatch].append(
            Part(batch, mask[rows_], logps[rows_], values[rows_], advantages[rows_], returns[rows_])
        )
        start += batch.n_responses

    def sums(values_ST: torch.Tensor) -> list[float]:
        return torch.where(mask, values_ST, 0.0).double().sum(1).tolist()  # type: ignore[no-any-return]

    total_steps = [sum(value for _, value in found) for found in steps]
    facts = {
        "kl": sums(objective.kl_tokens(logps, ref, "k1")),
        "kl_k3": sums(objective.kl_tokens(logps, ref, "k3")),
        "entropy": sums(entropy),
        "score": [value + more for value, more in zip(raw_scores.tolist(), total_steps, strict=True)],
        "score_shaped": [value + more for value, more in zip(scores.tolist(), total_steps, strict=True)],
        "rlhf_reward": sums(rewards),
        "length": mask.sum(1).tolist(),
        "ended": (~truncated).double().tolist(),
        "returns": sums(returns),
        "returns2": sums(returns.square()),
        "error": sums(returns - values),
        "error2": sums((returns - values).square()),
    }
    at = [(places[i // k], i % k) for i in order]
    rows_of = [{"at": at[row], **{name: values_[row] for name, values_ in facts.items()}} for row in range(len(order))]
    metrics = summarise(sorted(all_items(rows_of), key=lambda row: row["at"])) | {"objective/kl_coef": kl_coef}
    done = time.perf_counter()
    tokens = sum(len(s.ids) for s in samples)
    metrics |= {
        "speed/generate_tokens_per_s": tokens / max(generated - began, 1e-9),
        "speed/score_tokens_per_s": tokens / max(done - generated, 1e-9),
    }
    table = [
        {
            "rollout": index,
            "prompt_id": own[i // k].prompt_id,
            "prompt": own[i // k].prompt,
            "completion": sampled.completions[i],
            "score": facts["score"][row],
            "kl_nats": facts["kl"][row],
            "n_tokens": len(samples[i].ids),
            "truncated": samples[i].truncated,
        }
        for row, i in enumerate(order)
    ]
    return Rollout(index, minibatches, metrics, table)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a rollout from sums over each response's tokens, in fp64 and in the order of the rollout, so that
    they are the same for any number of processes."""
    n, tokens = len(rows), sum(row["length"] for row in rows)

    def mean(name: str) -> float:
        return float(sum(row[name] for row in rows) / n)

    def variance(name: str) -> float:
        total = sum(row[name] for row in rows)
        return float(sum(row[f"{name}2"] for row in rows) - total * total / tokens) / max(tokens - 1, 1)

    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    quantiles = torch.quantile(scores, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "objective/kl": mean("kl"),
        "objective/kl_k3": mean("kl_k3"),
        "objective/entropy": float(sum(row["entropy"] for row in rows) / tokens),
        "objective/score": mean("score"),
        "objective/score_shaped": mean("score_shaped"),
        "objective/rlhf_reward": mean("rlhf_reward"),
        **{f"objective/score_q{q}": value for q, value in zip((10, 50, 90), quantiles, strict=True)},
        "value/explained_variance": 1 - variance("error") / max(variance("returns"), 1e-8),
        "length/mean": mean("length"),
        "eos_rate": mean("ended"),
        "tokens": float(tokens),
    }
