"""What PPO decides by the KL to the reference: the penalty's coefficient, and when to stop."""

from __future__ import annotations

from toolkit.ppo.config import PPOConfig
from toolkit.ppo.objective import AdaptiveKl


class KlControl:
    """``coef`` is the coefficient of the next rollout. KL is in nats per response."""

    def __init__(self, config: PPOConfig) -> None:
        self.controller = AdaptiveKl(config.kl_coef, config.adaptive_kl_target, config.adaptive_kl_horizon)
        self.adaptive, self.max_kl = config.adaptive_kl, config.max_kl

    @property
    def coef(self) -> float:
        return self.controller.coef

    def restore(self, coef: float) -> None:
        """Go on as a checkpoint says."""
        self.controller.coef = coef

    def after_rollout(self, kl_nats: float, n_responses: int, penalised_nats: float) -> bool:
        """Adapt the coefficient by the KL that it weighs. True: the KL exceeds ``max_kl``, and training stops."""
        if self.adaptive:
            self.controller.update(penalised_nats, n_responses)
        return self.max_kl is not None and kl_nats > self.max_kl
