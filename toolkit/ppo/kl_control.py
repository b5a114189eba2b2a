"""What PPO decides by the KL to the reference: the penalty's coefficient, milestones, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.ppo.config import PPOConfig
from toolkit.ppo.objective import AdaptiveKl


@dataclass(frozen=True)
class KlDecision:
    """``stop``: the KL exceeds ``max_kl``. ``keep_policy``: it has reached a milestone for the first time."""

    stop: bool
    keep_policy: bool


class KlControl:
    """``coef`` is the coefficient of the next rollout, ``milestones`` are those that no rollout has reached yet.

    KL is in nats per response.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.controller = AdaptiveKl(config.kl_coef, config.adaptive_kl_target, config.adaptive_kl_horizon)
        self.adaptive, self.max_kl = config.adaptive_kl, config.max_kl
        self.milestones = sorted(config.kl_milestones or [])

    @property
    def coef(self) -> float:
        return self.controller.coef

    def restore(self, coef: float, milestones: Sequence[float]) -> None:
        """Go on as a checkpoint says."""
        self.controller.coef, self.milestones = coef, list(milestones)

    def after_rollout(self, kl_nats: float, n_responses: int) -> KlDecision:
        """Adapt the coefficient, and pass the milestones that a rollout's KL has reached."""
        if self.adaptive:
            self.controller.update(kl_nats, n_responses)
        ahead = [milestone for milestone in self.milestones if not kl_nats >= milestone]
        reached = len(ahead) < len(self.milestones)
        self.milestones = ahead
        return KlDecision(stop=self.max_kl is not None and kl_nats > self.max_kl, keep_policy=reached)
