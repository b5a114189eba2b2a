"""Milestones of the KL to the reference, at which the policy is kept."""

from __future__ import annotations

from collections.abc import Sequence


class KlMilestones:
    """``ahead``: those that no rollout has reached yet, in nats per response."""

    def __init__(self, milestones: Sequence[float]) -> None:
        self.ahead = sorted(milestones)

    def reached(self, kl_nats: float) -> bool:
        """Whether a rollout of this KL is the first to reach one of them; those that it reaches lie behind then.

        >>> milestones = KlMilestones([1.0, 2.0, 3.0])
        >>> [milestones.reached(kl) for kl in (0.5, 2.5, 2.5, 3.0)]
        [False, True, False, True]
        """
        before = len(self.ahead)
        self.ahead = [milestone for milestone in self.ahead if not kl_nats >= milestone]
        return len(self.ahead) < before
