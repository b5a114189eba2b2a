"""One rollout: sample, score, and lay out everything that the updates need.

A rollout is one set of prompts whatever the number of processes: its samples are seeded by their place in it, its
minibatches are drawn for all processes together, and each process computes a share of every minibatch.

Shapes: S responses of this process, in the order of the packs that they are computed in; T tokens of the longest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.engine.distributed import all_items, all_sum, world
from toolkit.engine.tree import TreeBatch
from toolkit.models.inspect import precision
from toolkit.ppo import objective
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import PPOModels
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import Responses, Scores, StepRewards
from toolkit.ppo.rollout_metrics import CompletionRow, CriticSums, ResponseSums, summarise
from toolkit.ppo.sampling import SamplingSettings, Scorer, sample

# The default of token_budget. A pass is longer than in scoring, since its fixed costs count twice: there and back.
PASS_TOKENS = {"cpu": 2048, "cuda": 4096}


@dataclass(frozen=True)
class Microbatch:
    """The part of a minibatch that is computed at once: a packed batch, and its rows of the targets [S, T].

    Without a critic there are no values and no returns.
    """

    batch: TreeBatch
    mask_ST: torch.Tensor
    old_logps_ST: torch.Tensor
    old_values_ST: torch.Tensor | None
    advantages_ST: torch.Tensor
    returns_ST: torch.Tensor | None


@dataclass(frozen=True)
class Rollout:
    """This process's share of a rollout.

    ``minibatches[m]`` are the microbatches of minibatch m, packed as the old log-probabilities were. ``metrics`` are
    those of all processes together. ``completions`` has one row per response of this process.
    """

    index: int
    minibatches: list[list[Microbatch]]
    metrics: dict[str, float]
    completions: list[CompletionRow]


@torch.no_grad()
def collect(
    models: PPOModels,
    prompts: Sequence[PromptIds],
    config: PPOConfig,
    score: Scorer,
    sampling: SamplingSettings,
    *,
    index: int,
    kl_coef: float,
    passes: int = 1,
) -> Rollout:
    """Sample ``samples_per_prompt`` responses for each prompt and compute rewards, advantages and returns.

    ``prompts`` are those of all processes; a minibatch is computed in about ``passes`` microbatches or more.
    """
    started = time.perf_counter()
    share = share_of(prompts, config.num_mini_batches, sampling.seed, index)
    responses = sample_share(models, share, config, sampling, index)
    sampled = time.perf_counter()
    scored = scored_responses(share, responses, score(responses, models, sampling.dtype))
    with models.whole("policy"):  # its engine may have to try longer trees
        packs = pack_minibatches(models, share, responses, config, passes)
    scored = [scored[i] for pack in packs for i in pack.responses]
    forward = forward_passes(models, packs, config.temperature, sampling.dtype)
    rewards = shape_rewards(forward, scored, config, kl_coef)
    advantages_ST, returns_ST = advantages_and_returns(forward, rewards, config)
    minibatches = minibatches_of(packs, forward, advantages_ST, returns_ST, config.num_mini_batches)
    sums = response_sums(scored, forward, rewards, returns_ST)
    metrics = summarise(all_items(sums)) | {"objective/kl_coef": kl_coef}
    n_tokens = sum(response.n_tokens for response in scored)
    metrics["speed/generate_tokens_per_s"] = n_tokens / max(sampled - started, 1e-9)
    metrics["speed/score_tokens_per_s"] = n_tokens / max(time.perf_counter() - sampled, 1e-9)
    return Rollout(index, minibatches, metrics, completion_rows(index, scored, sums))


# -- which prompts, and their responses


@dataclass(frozen=True)
class PromptShare:
    """This process's prompts, minibatch after minibatch; ``places`` are those in the rollout of all processes."""

    prompts: list[PromptIds]
    places: list[int]
    minibatch_sizes: list[int]


def split_evenly(n: int, parts: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition of range(n) into ``parts`` lists whose sizes differ by one at most."""
    order = torch.randperm(n, generator=generator).tolist()
    return [order[m::parts] for m in range(parts)]


def share_of(prompts: Sequence[PromptIds], n_minibatches: int, seed: int, index: int) -> PromptShare:
    """The prompts of this process, in minibatches that are drawn for all processes together."""
    rank, size = world()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    minibatches = [minibatch[rank::size] for minibatch in split_evenly(len(prompts), n_minibatches, generator)]
    places = [place for minibatch in minibatches for place in minibatch]
    return PromptShare([prompts[place] for place in places], places, [len(minibatch) for minibatch in minibatches])


def sample_share(
    models: PPOModels, share: PromptShare, config: PPOConfig, sampling: SamplingSettings, index: int
) -> Responses:
    """Responses to this process's prompts, each seeded by its place in the rollout."""

    def key(i: int, k: int) -> tuple[object, ...]:
        return (sampling.seed, "rollout", index, share.places[i], share.prompts[i].prompt_id, k)

    batch_size = config.per_device_train_batch_size
    return sample(models, share.prompts, key, config, sampling, n=config.samples_per_prompt, batch_size=batch_size)


@dataclass(frozen=True)
class ScoredResponse:
    """``place``: the prompt's place in the rollout, and the number of the response among the prompt's samples.

    ``sampler_logp``: the response's log-probability under what sampled it.
    """

    place: tuple[int, int]
    prompt: PromptIds
    completion: str
    n_tokens: int
    truncated: bool
    sampler_logp: float
    score: float
    steps: StepRewards
    disagreement: float | None  # of an ensemble's members


def scored_responses(share: PromptShare, responses: Responses, scores: Scores) -> list[ScoredResponse]:
    """A record of each response, in the order of ``responses``."""
    origins = [
        (place, k, prompt)
        for place, prompt, tree in zip(share.places, share.prompts, responses.trees, strict=True)
        for k in range(len(tree.response_ids))
    ]
    ids, texts, logps = responses.completion_ids, responses.completions, responses.sampler_logps
    return [
        ScoredResponse(
            place=(place, k),
            prompt=prompt,
            completion=texts[i],
            n_tokens=len(ids[i]),
            truncated=responses.truncated[i],
            sampler_logp=logps[i],
            score=scores.values[i],
            steps=scores.steps[i],
            disagreement=scores.disagreement[i] if scores.disagreement else None,
        )
        for i, (place, k, prompt) in enumerate(origins)
    ]


# -- forward passes


@dataclass(frozen=True)
class Pack:
    """A microbatch before it has targets. ``responses``: the indices of its responses among those of the process."""

    minibatch: int
    responses: list[int]
    batch: TreeBatch


def pack_minibatches(
    models: PPOModels, share: PromptShare, responses: Responses, config: PPOConfig, passes: int
) -> list[Pack]:
    """Cut each minibatch into packs of at most ``token_budget`` tokens.

    They are made once: the first update then repeats the very computation of the old log-probabilities, and its ratio
    is exactly 1.
    """
    engine, k = models.engine, config.samples_per_prompt
    packs, first = [], 0
    for minibatch, size in enumerate(share.minibatch_sizes):
        trees = responses.trees[first : first + size]
        budget = config.token_budget or PASS_TOKENS[engine.device.type]
        if passes > 1:
            budget = min(budget, -(-sum(len(tree.inputs(last_tokens=False)) for tree in trees) // passes))
        for chosen in engine.batches(trees, budget):
            numbers = [(first + i) * k + j for i in chosen for j in range(k)]
            packs.append(Pack(minibatch, numbers, engine.pack([trees[i] for i in chosen])))
        first += size
    return packs


@dataclass(frozen=True)
class ForwardPasses:
    """What the models compute for every sampled token, each [S, T]; the mask is true where a token was sampled.

    Without a critic there are no values. ``averaged_logps_ST`` are those of an averaged reference, if there is one.
    """

    mask_ST: torch.Tensor
    logps_ST: torch.Tensor
    entropy_ST: torch.Tensor
    reference_logps_ST: torch.Tensor
    averaged_logps_ST: torch.Tensor | None
    values_ST: torch.Tensor | None

    def penalised_kl(self, estimator: str) -> torch.Tensor:
        """[S, T] estimates of the KL that the penalty weighs, in nats: to the averaged reference, if there is one."""
        against = self.reference_logps_ST if self.averaged_logps_ST is None else self.averaged_logps_ST
        return objective.kl_tokens(self.logps_ST, against, estimator)


def forward_passes(models: PPOModels, packs: Sequence[Pack], temperature: float, dtype: torch.dtype) -> ForwardPasses:
    """Policy, critic (if any) and reference on every pack: one model after another, which is whole in the meantime."""
    batches = [pack.batch for pack in packs]
    lengths = [len(ids) for batch in batches for tree in batch.trees for ids in tree.response_ids]
    width, device = max(lengths, default=1), models.engine.device
    compute: Callable[..., tuple[Any, ...]] = models.logps_and_values if models.shares_trunk else models.policy_logps
    averaged, values = None, None

    def rows(values_N: Sequence[torch.Tensor]) -> torch.Tensor:
        none = torch.zeros(0, width, device=device)  # a process may have no prompt
        each = [scatter_to_responses(values, batch, width) for values, batch in zip(values_N, batches, strict=True)]
        return torch.cat([none, *each])

    with precision(device, dtype):
        with models.whole("policy"):
            of_policy = [compute(batch, temperature, with_entropy=True) for batch in batches]
        if models.shares_trunk:
            values = [values_N for _, _, values_N in of_policy]
        elif models.has_critic:
            with models.whole("critic"):
                values = [models.values(batch) for batch in batches]
        with models.whole("reference"):
            reference = [models.reference_logps(batch, temperature) for batch in batches]
        if models.averaged_reference is not None:
            with models.averaged_reference.in_place(), models.whole("policy"):
                averaged = [models.policy_logps(batch, temperature)[0] for batch in batches]
    return ForwardPasses(
        mask_ST=rows([torch.ones_like(one[0]) for one in of_policy]) > 0,
        logps_ST=rows([one[0] for one in of_policy]),
        entropy_ST=rows([one[1] for one in of_policy]),
        reference_logps_ST=rows(reference),
        averaged_logps_ST=None if averaged is None else rows(averaged),
        values_ST=None if values is None else rows(values),
    )


def scatter_to_responses(values_N: torch.Tensor, batch: TreeBatch, width: int) -> torch.Tensor:
    """[R, width] from [N]: each response's values at the left of its row, then zeros."""
    lengths_R = torch.bincount(batch.owner, minlength=batch.n_responses)
    first_R = lengths_R.cumsum(0) - lengths_R
    column_N = torch.arange(batch.owner.numel(), device=batch.owner.device) - first_R[batch.owner]
    out = torch.zeros(batch.n_responses, width, dtype=values_N.dtype, device=values_N.device)
    return out.index_put((batch.owner, column_N), values_N)


# -- rewards, advantages, minibatches


@dataclass(frozen=True)
class ShapedRewards:
    """``scores_S``: the raw scores clipped, those of truncated responses replaced. ``rewards_ST``: per token."""

    raw_scores_S: torch.Tensor
    scores_S: torch.Tensor
    rewards_ST: torch.Tensor


def shape_rewards(
    forward: ForwardPasses, responses: Sequence[ScoredResponse], config: PPOConfig, kl_coef: float
) -> ShapedRewards:
    """The KL penalty on every token, the shaped score on the last one, and step rewards at their tokens."""
    device = forward.mask_ST.device
    raw_scores_S = torch.tensor([response.score for response in responses], device=device)
    scores_S = objective.shape_scores(
        raw_scores_S,
        torch.tensor([response.truncated for response in responses], dtype=torch.bool, device=device),
        clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
    )
    kl_ST = forward.penalised_kl(config.kl_estimator)
    rewards_ST = objective.token_rewards(kl_ST, scores_S, forward.mask_ST, kl_coef)
    rewards_ST = objective.add_steps(rewards_ST, [response.steps for response in responses])
    if config.whiten_rewards:
        rewards_ST = objective.masked_whiten(rewards_ST, forward.mask_ST, shift_mean=False, over=all_sum)
    return ShapedRewards(raw_scores_S, scores_S, rewards_ST)


def advantages_and_returns(
    forward: ForwardPasses, rewards: ShapedRewards, config: PPOConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[S, T] advantages, whitened over all processes if the settings say so, and [S, T] returns, never whitened.

    Without a critic there are no returns, and the advantages are leave-one-out.
    """
    returns_ST = None
    if forward.values_ST is None:
        advantages_ST = objective.rloo(rewards.rewards_ST, forward.mask_ST, config.samples_per_prompt)
    else:
        advantages_ST, returns_ST = objective.gae(
            rewards.rewards_ST, forward.values_ST, forward.mask_ST, gamma=config.gamma, lam=config.lam
        )
    if config.whiten_advantages:
        advantages_ST = objective.masked_whiten(advantages_ST, forward.mask_ST, over=all_sum)
    return advantages_ST, returns_ST


def minibatches_of(
    packs: Sequence[Pack],
    forward: ForwardPasses,
    advantages_ST: torch.Tensor,
    returns_ST: torch.Tensor | None,
    n_minibatches: int,
) -> list[list[Microbatch]]:
    """The microbatches of each minibatch: packs with their targets."""
    minibatches: list[list[Microbatch]] = [[] for _ in range(n_minibatches)]
    start = 0
    for pack in packs:
        rows = slice(start, start + pack.batch.n_responses)
        minibatches[pack.minibatch].append(
            Microbatch(
                batch=pack.batch,
                mask_ST=forward.mask_ST[rows],
                old_logps_ST=forward.logps_ST[rows],
                old_values_ST=None if forward.values_ST is None else forward.values_ST[rows],
                advantages_ST=advantages_ST[rows],
                returns_ST=None if returns_ST is None else returns_ST[rows],
            )
        )
        start = rows.stop
    return minibatches


# -- for the log


def response_sums(
    responses: Sequence[ScoredResponse],
    forward: ForwardPasses,
    rewards: ShapedRewards,
    returns_ST: torch.Tensor | None,
) -> list[ResponseSums]:
    """What each response adds to the metrics."""

    def sums(values_ST: torch.Tensor) -> list[float]:
        return sums_of_tokens(values_ST, forward.mask_ST)

    scores, scores_shaped = rewards.raw_scores_S.tolist(), rewards.scores_S.tolist()
    step_totals = [sum(value for _, value in response.steps) for response in responses]
    kl = sums(objective.kl_tokens(forward.logps_ST, forward.reference_logps_ST, "k1"))
    kl_k3 = sums(objective.kl_tokens(forward.logps_ST, forward.reference_logps_ST, "k3"))
    averaged = sums(forward.penalised_kl("k1")) if forward.averaged_logps_ST is not None else None
    entropy, rlhf_reward = sums(forward.entropy_ST), sums(rewards.rewards_ST)
    logps = sums(forward.logps_ST)
    critic = critic_sums(forward, returns_ST)
    return [
        ResponseSums(
            place=response.place,
            n_tokens=response.n_tokens,
            ended=float(not response.truncated),
            score=scores[i] + step_totals[i],
            score_shaped=scores_shaped[i] + step_totals[i],
            kl=kl[i],
            kl_k3=kl_k3[i],
            kl_averaged=averaged[i] if averaged is not None else None,
            entropy=entropy[i],
            sampler_difference=abs(response.sampler_logp - logps[i]),
            rlhf_reward=rlhf_reward[i],
            disagreement=response.disagreement,
            critic=critic[i] if critic else None,
        )
        for i, response in enumerate(responses)
    ]


def critic_sums(forward: ForwardPasses, returns_ST: torch.Tensor | None) -> list[CriticSums]:
    """What each response adds to the critic's metrics; empty without a critic."""
    if forward.values_ST is None or returns_ST is None:
        return []
    error_ST = returns_ST - forward.values_ST
    of_responses = (returns_ST, returns_ST.square(), error_ST, error_ST.square())
    columns = (sums_of_tokens(values_ST, forward.mask_ST) for values_ST in of_responses)
    return [CriticSums(*row) for row in zip(*columns, strict=True)]


def sums_of_tokens(values_ST: torch.Tensor, mask_ST: torch.Tensor) -> list[float]:
    """[S] sums over the sampled tokens, in fp64."""
    sums: list[float] = torch.where(mask_ST, values_ST, 0.0).double().sum(1).tolist()
    return sums


def completion_rows(
    index: int, responses: Sequence[ScoredResponse], sums: Sequence[ResponseSums]
) -> list[CompletionRow]:
    """The rows of this process in the table of completions."""
    return [
        CompletionRow(
            rollout=index,
            prompt_id=response.prompt.prompt_id,
            prompt=response.prompt.prompt,
            completion=response.completion,
            score=sums_of.score,
            kl_nats=sums_of.kl,
            n_tokens=response.n_tokens,
            truncated=response.truncated,
        )
        for response, sums_of in zip(responses, sums, strict=True)
    ]
