"""One update of PPO: the gradients of a minibatch, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch

from toolkit.engine.distributed import all_max, all_sum, world
from toolkit.models.encoding import Tree
from toolkit.models.inspect import precision
from toolkit.ppo import objective
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import PPOModels
from toolkit.ppo.rollout import PASS_TOKENS, Microbatch, scatter_to_responses

# A tree of which every model can make a pass.
NOTHING = Tree([0], [[0]])


@dataclass(frozen=True)
class UpdateSums:
    """Sums over the microbatches of a minibatch and over processes. The losses are divided by its tokens already."""

    policy_loss: float = 0.0
    value_loss: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    approx_kl: float = 0.0
    value_clipped: float = 0.0
    ptx_loss: float = 0.0
    ptx_tokens: float = 0.0

    def __add__(self, other: UpdateSums) -> UpdateSums:
        return UpdateSums(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def over_processes(self, device: torch.device) -> UpdateSums:
        """The sums of all processes."""
        return UpdateSums(*all_sum(torch.tensor(astuple(self), dtype=torch.float64, device=device)).tolist())

    def metrics(self, n_tokens: int, *, has_critic: bool) -> dict[str, float]:
        """Entries of the log; ``n_tokens``: tokens of the whole minibatch."""
        of_policy = {
            "policy/ratio": self.ratio / n_tokens,
            "policy/clip_fraction": self.clipped / n_tokens,
            "policy/approx_kl": self.approx_kl / n_tokens,
            "loss/policy": self.policy_loss,
        }
        of_critic = {
            "value/loss": self.value_loss,
            "value/clip_fraction": self.value_clipped / n_tokens,
        }
        return of_policy | of_critic if has_critic else of_policy


def token_count(minibatch: Sequence[Microbatch]) -> int:
    """Sampled tokens of this process in a minibatch."""
    return sum(int(microbatch.mask_ST.sum()) for microbatch in minibatch)


@dataclass(frozen=True)
class Update:
    """Computes gradients and adds them to those that the weights have. ``backward`` differentiates a loss.

    With ``critic_only`` the policy's weights get no gradient.
    """

    models: PPOModels
    config: PPOConfig
    dtype: torch.dtype
    backward: Callable[[torch.Tensor], None]
    critic_only: bool

    def minibatch_gradients(self, minibatch: Sequence[Microbatch], n_tokens: int) -> UpdateSums:
        """Gradients of the policy's loss and, with a critic, of the value loss.

        Both are divided by ``n_tokens``, the minibatch's tokens of all processes.
        """
        self.models.train()
        beside = [self._beside() for _ in range(self._n_beside(len(minibatch)))]
        return sum((self._microbatch_gradients(item, n_tokens) for item in [*minibatch, *beside]), UpdateSums())

    def _n_beside(self, n: int) -> int:
        """Of passes with gradients that another process has and this one, which has n, has not.

        It takes part in them where models are sharded: the others need its shards.
        """
        return all_max(n, self.models.engine.device) - n if self.models.sharded else 0

    def _beside(self) -> Microbatch:
        """A microbatch whose losses and gradients are zero."""
        batch = self.models.engine.pack([NOTHING])
        zero_ST = torch.zeros(1, 1, device=self.models.engine.device)
        return Microbatch(batch, zero_ST > 0, zero_ST, zero_ST, zero_ST, zero_ST)

    def _microbatch_gradients(self, microbatch: Microbatch, n_tokens: int) -> UpdateSums:
        """The policy's backward pass comes before the critic's forward pass, so that their graphs need not be in memory
        together. Where they share a trunk, one pass of each kind serves both."""
        models, shared = self.models, self.models.shares_trunk
        with precision(models.engine.device, self.dtype), torch.set_grad_enabled(not self.critic_only):
            if shared:
                logps_N, _, values_N = models.logps_and_values(microbatch.batch, self.config.temperature)
            else:
                logps_N, _ = models.policy_logps(microbatch.batch, self.config.temperature)
        policy = self._policy_loss(logps_N, microbatch, n_tokens)
        if shared and not self.critic_only:
            value_loss, value_clipped = self._value_loss(values_N, microbatch, n_tokens)
            self.backward(self.config.vf_coef * value_loss + policy.loss)
        else:
            if not self.critic_only:
                self.backward(policy.loss)
            if not models.has_critic:
                return self._sums(policy)
            with precision(models.engine.device, self.dtype):
                values_N = models.values(microbatch.batch)
            value_loss, value_clipped = self._value_loss(values_N, microbatch, n_tokens)
            self.backward(self.config.vf_coef * value_loss)
        if shared and self.critic_only:  # only the head is the critic's; the trunk stays as it is
            for weight in models.policy_parameters():
                weight.grad = None
        of_critic = UpdateSums(value_loss=value_loss.item(), value_clipped=value_clipped.item())
        return self._sums(policy) + of_critic

    @staticmethod
    def _sums(policy: objective.PolicyLoss) -> UpdateSums:
        return UpdateSums(
            policy_loss=policy.loss.item(),
            ratio=policy.ratio_sum.item(),
            clipped=policy.clipped.item(),
            approx_kl=policy.approx_kl_sum.item(),
        )

    def _policy_loss(self, logps_N: torch.Tensor, microbatch: Microbatch, n_tokens: int) -> objective.PolicyLoss:
        return objective.policy_loss(
            scatter_to_responses(logps_N, microbatch.batch, microbatch.mask_ST.shape[1]),
            microbatch.old_logps_ST,
            microbatch.advantages_ST,
            microbatch.mask_ST,
            cliprange=self.config.cliprange,
            n_tokens=n_tokens,
            dual_clip=self.config.dual_clip,
        )

    def _value_loss(
        self, values_N: torch.Tensor, microbatch: Microbatch, n_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert microbatch.old_values_ST is not None and microbatch.returns_ST is not None
        return objective.value_loss(
            scatter_to_responses(values_N, microbatch.batch, microbatch.mask_ST.shape[1]),
            microbatch.old_values_ST,
            microbatch.returns_ST,
            microbatch.mask_ST,
            cliprange_value=self.config.cliprange_value,
            n_tokens=n_tokens,
        )

    def ptx_gradients(self, texts: Sequence[Tree], step: int) -> UpdateSums:
        """Gradients of the negative log-likelihood per token of this optimiser step's texts, weighted by ``ptx_coef``
        (Ouyang et al. 2022, equation 2, per token).

        The loss is divided by the tokens of all processes; a process computes its share of the texts.
        """
        rank, size = world()
        first = step * self.config.ptx_batch_size
        batch = [texts[i % len(texts)] for i in range(first, first + self.config.ptx_batch_size)]
        n_tokens = sum(len(ids) for tree in batch for ids in tree.response_ids)
        share, engine, sums = batch[rank::size], self.models.engine, UpdateSums()
        passes = list(engine.batches(share, self.config.token_budget or PASS_TOKENS[engine.device.type]))
        for chosen in passes:
            with precision(engine.device, self.dtype):
                logps_N, _ = self.models.policy_logps(engine.pack([share[i] for i in sorted(chosen)]), 1.0)
            loss = -logps_N.sum() / n_tokens
            self.backward(self.config.ptx_coef * loss)
            sums += UpdateSums(ptx_loss=loss.item(), ptx_tokens=len(logps_N))
        for _ in range(self._n_beside(len(passes))):
            with precision(engine.device, self.dtype):
                logps_N, _ = self.models.policy_logps(engine.pack([NOTHING]), 1.0)
            self.backward(0.0 * logps_N.sum())
        return sums
