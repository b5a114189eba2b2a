"""The equations of PPO for language models, as pure functions of tensors.

Shapes: S responses, T response tokens, ``mask_ST`` true where a token was sampled (the EOS included). Training
has fp32 inputs; fp64 ones stay so. Masked entries never reach a result, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Adds a tensor up over the processes that share a rollout. One process alone has nothing to add.
Sum = Callable[[torch.Tensor], torch.Tensor]


def alone(total: torch.Tensor) -> torch.Tensor:
    return total


def masked_mean(values_ST: torch.Tensor, mask_ST: torch.Tensor, over: Sum = alone) -> torch.Tensor:
    """Mean over the sampled tokens of all processes."""
    sums = over(torch.stack([torch.where(mask_ST, values_ST, 0.0).sum(), mask_ST.sum().to(values_ST.dtype)]))
    return sums[0] / sums[1]


def masked_var(values_ST: torch.Tensor, mask_ST: torch.Tensor, over: Sum = alone) -> torch.Tensor:
    """Variance over the sampled tokens of all processes, with Bessel's correction."""
    centred = torch.where(mask_ST, values_ST - masked_mean(values_ST, mask_ST, over), 0.0)
    sums = over(torch.stack([centred.square().sum(), mask_ST.sum().to(values_ST.dtype)]))
    return sums[0] / (sums[1] - 1).clamp(min=1)


def masked_whiten(
    values_ST: torch.Tensor, mask_ST: torch.Tensor, *, shift_mean: bool = True, over: Sum = alone
) -> torch.Tensor:
    """Unit variance over the sampled tokens; zero mean as well unless ``shift_mean`` is off (rewards keep theirs).

    Huang et al. 2024 (arXiv 2403.17031), detail "per-minibatch whitening", here over the whole rollout of all
    processes.
    """
    mean = masked_mean(values_ST, mask_ST, over)
    whitened = (values_ST - mean) * torch.rsqrt(masked_var(values_ST, mask_ST, over) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask_ST, whitened, 0.0)


def kl_tokens(logps_ST: torch.Tensor, ref_logps_ST: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's samples, in nats.

    ``k1 = log p/q`` is unbiased and may be negative; ``k3 = q/p - 1 - log q/p`` is unbiased and never is
    (Schulman 2020, "Approximating KL divergence").

    >>> kl_tokens(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()).item()  # ln 2
    0.6931471824645996
    """
    log_ratio = logps_ST - ref_logps_ST
    if estimator == "k1":
        return log_ratio
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}: k1 or k3")


def shape_scores(
    scores_S: torch.Tensor, truncated_S: torch.Tensor, *, clip: float | None, missing_eos_penalty: float | None
) -> torch.Tensor:
    """Clip the reward model's scores, then let the penalty *replace* that of a response without an EOS.

    Huang et al. 2024, detail "EOS trick"; OpenRLHF and DeepSpeed-Chat for the clip.
    """
    shaped = scores_S.to(torch.promote_types(scores_S.dtype, torch.float32))
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        shaped = torch.where(truncated_S, torch.full_like(shaped, missing_eos_penalty), shaped)
    return shaped


def token_rewards(kl_ST: torch.Tensor, scores_S: torch.Tensor, mask_ST: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """[S, T] rewards: ``-kl_coef * kl`` at every token, and the score on the last one (the EOS, where there is one).

    Ziegler et al. 2019, equation 2; Ouyang et al. 2022.
    """
    rewards_ST = torch.where(mask_ST, -kl_coef * kl_ST, 0.0)
    last_S = mask_ST.sum(1) - 1
    rows = torch.arange(mask_ST.shape[0], device=mask_ST.device)
    rewards_ST[rows, last_S] += scores_S.to(rewards_ST.dtype)
    return rewards_ST


def add_steps(rewards_ST: torch.Tensor, steps_S: list[list[tuple[int, float]]]) -> torch.Tensor:
    """Token rewards plus a process reward's steps, each a (token position, value)."""
    out = rewards_ST.clone()
    for row, steps in enumerate(steps_S):
        for position, value in steps:
            out[row, position] += value
    return out


def gae(
    rewards_ST: torch.Tensor, values_ST: torch.Tensor, mask_ST: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, each [S, T] (Schulman et al. 2016, equations 11 to 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` with ``V = 0`` behind the last token,
    ``A_t = sum_l (gamma lam)^l delta_{t+l}``, return ``R_t = A_t + V_t``.
    A truncated response ends its episode as well: its score stands on its last token.

    With gamma = lam = 1, rewards (0, 0, 1) and values (0.5, 0.5, 0.5), every advantage is 1 - 0.5:

    >>> ones = torch.ones(1, 3, dtype=torch.bool)
    >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), ones, gamma=1.0, lam=1.0)[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    dtype = torch.promote_types(values_ST.dtype, torch.float32)
    values_ST = torch.where(mask_ST, values_ST.to(dtype), 0.0)
    rewards_ST = torch.where(mask_ST, rewards_ST.to(dtype), 0.0)
    following = torch.cat([values_ST[:, 1:], torch.zeros_like(values_ST[:, :1])], dim=1)
    delta_ST = rewards_ST + gamma * following - values_ST
    advantages_ST = torch.zeros_like(delta_ST)
    running = torch.zeros_like(delta_ST[:, 0])
    for t in range(delta_ST.shape[1] - 1, -1, -1):
        # Behind the last token delta is 0, so what runs back from the padding is 0 too.
        running = delta_ST[:, t] + gamma * lam * running
        advantages_ST[:, t] = running
    return torch.where(mask_ST, advantages_ST, 0.0), torch.where(mask_ST, advantages_ST + values_ST, 0.0)


def rloo(rewards_ST: torch.Tensor, mask_ST: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """[S, T] leave-one-out advantages (REINFORCE leave-one-out, RLOO: Ahmadian et al. 2024, arXiv 2402.14740, section
    3.3; Kool et al. 2019). They need no critic.

    A response is one action, whose reward R is the sum over its tokens: the score minus the KL penalty. Its advantage
    is R minus the mean R of the prompt's other responses, the same for each of its tokens. The rows of a prompt's
    ``samples_per_prompt`` responses stand next to each other.

    Three responses with the rewards 1, 2 and 6 have the advantages 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2:

    >>> rewards_ST = torch.tensor([[0.5, 0.5], [2.0, 0.0], [6.0, 0.0]])
    >>> mask_ST = torch.tensor([[True, True], [True, False], [True, False]])
    >>> rloo(rewards_ST, mask_ST, samples_per_prompt=3)
    tensor([[-3.0000, -3.0000],
            [-1.5000,  0.0000],
            [ 4.5000,  0.0000]])
    """
    totals_PK = torch.where(mask_ST, rewards_ST, 0.0).sum(1).view(-1, samples_per_prompt)
    others_PK = (totals_PK.sum(1, keepdim=True) - totals_PK) / (samples_per_prompt - 1)
    return torch.where(mask_ST, (totals_PK - others_PK).view(-1, 1), 0.0)


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to differentiate (summed over tokens, divided by ``n_tokens``) and sums for the log."""

    loss: torch.Tensor
    ratio_sum: torch.Tensor
    clipped: torch.Tensor
    approx_kl_sum: torch.Tensor


def policy_loss(
    logps_ST: torch.Tensor,
    old_logps_ST: torch.Tensor,
    advantages_ST: torch.Tensor,
    mask_ST: torch.Tensor,
    *,
    cliprange: float,
    n_tokens: int,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al. 2017, equation 7), to be minimised.

    ``dual_clip`` = c > 1 bounds it from below by c A where the advantage A is negative, so that a ratio that ran away
    cannot dominate (Ye et al. 2020, arXiv 1912.09729).
    ``n_tokens`` is the count of the whole minibatch over all its parts and processes, so that accumulating parts
    gives the gradient of the whole. ``approx_kl`` is k3 of old against new.
    """
    log_ratio = torch.where(mask_ST, logps_ST - old_logps_ST, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages_ST * ratio
    clipped = -advantages_ST * ratio.clamp(1 - cliprange, 1 + cliprange)
    worse = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        worse = torch.where(advantages_ST < 0, torch.minimum(worse, -dual_clip * advantages_ST), worse)
    per_token = torch.where(mask_ST, worse, 0.0)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return PolicyLoss(
        loss=per_token.sum() / n_tokens,
        ratio_sum=torch.where(mask_ST, ratio, 0.0).sum(),
        clipped=((clipped > unclipped) & mask_ST).sum(),
        approx_kl_sum=torch.where(mask_ST, ratio - 1 - log_ratio, 0.0).sum(),
    )


def value_loss(
    values_ST: torch.Tensor,
    old_values_ST: torch.Tensor,
    returns_ST: torch.Tensor,
    mask_ST: torch.Tensor,
    *,
    cliprange_value: float,
    n_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the clipped squared error (as in OpenAI's baselines; Huang et al. 2024), and how many tokens it clipped."""
    near = old_values_ST + (values_ST - old_values_ST).clamp(-cliprange_value, cliprange_value)
    free, held = (values_ST - returns_ST).square(), (near - returns_ST).square()
    per_token = torch.where(mask_ST, torch.maximum(free, held), 0.0)
    return 0.5 * per_token.sum() / n_tokens, ((held > free) & mask_ST).sum()


@dataclass
class AdaptiveKl:
    """Proportional control of the KL coefficient (Ziegler et al. 2019, section 2.2)."""

    coef: float
    target: float
    horizon: int

    def update(self, kl_nats: float, n_responses: int) -> None:
        error = min(max(kl_nats / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n_responses / self.horizon
