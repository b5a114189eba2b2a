"""Policies at set distances from the reference.

An optimiser step, or a rollout's, may pass a KL milestone by nats. So the policy that is kept lies between the last two
measured policies: their weights are interpolated, and the share is found by bisection, each try measured on new
samples. The KL is continuous in the share, so there is one that meets the milestone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MILESTONES_FILE = "milestones.safetensors"
# Responses of a measurement. The log-ratio's variance is about twice the KL: the standard error is 0.13 nats at 1 nat.
RESPONSES = 128
# Bisection ends at this relative distance from the milestone, or after this many measurements. Where another token is
# sampled, the estimate jumps by a part of its standard error, so that it may have no value nearer.
TOLERANCE, MEASUREMENTS = 0.05, 8
# Below this share of a milestone, an estimate on few responses is enough to say that it is not reached.
NEAR = 0.5


@dataclass(frozen=True)
class MilestonePolicy:
    """The policy that is kept for ``milestone``: its measured KL, and the step at which that was passed."""

    milestone: float
    kl_nats: float
    kl_standard_error: float
    step: int

    @property
    def name(self) -> str:
        """The name of its folder.

        >>> MilestonePolicy(2.0, 1.97, 0.2, 30).name
        'kl-2'
        """
        return f"kl-{self.milestone:g}"

    def facts(self) -> dict[str, object]:
        """For the record of its training."""
        return {"step": self.step} | {
            "kl_milestone": self.milestone,
            "kl_nats": self.kl_nats,
            "kl_standard_error": self.kl_standard_error,
        }

    def __str__(self) -> str:
        return (
            f"kept a policy at KL {self.kl_nats:.2f} nats (standard error {self.kl_standard_error:.2f}) for the "
            f"milestone {self.milestone:g}, passed by step {self.step}"
        )


class KlMilestones:
    """Calls ``keep`` for each milestone, with the policy's weights in the place of ``weights``.

    ``measure()`` gives log pi / pi_ref in nats of :data:`RESPONSES` new samples, those of all processes. Its samples
    have the same seeds every time, so that two measurements differ by the weights. ``ahead`` are the milestones that no
    policy has reached.
    """

    def __init__(
        self,
        milestones: Sequence[float],
        weights: Sequence[torch.nn.Parameter],
        measure: Callable[[], torch.Tensor],
        keep: Callable[[MilestonePolicy], None],
    ) -> None:
        self.ahead, self.weights, self.measure, self.keep = sorted(set(milestones)), weights, measure, keep
        self.before: list[torch.Tensor] | None = None  # weights of the last measured policy

    def copy(self) -> list[torch.Tensor]:
        """The weights as they are."""
        return [weight.detach().cpu().clone() for weight in self.weights]

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights, values, strict=True):
                weight.copy_(value)

    def start(self) -> None:
        """Training begins from the policy as it is."""
        if self.ahead:
            self.before = self.copy()

    def reach(self, step: int, kl_nats: float | None = None) -> None:
        """Keep a policy for each milestone that training has passed since the last call.

        ``kl_nats`` is an estimate of today's KL on few responses: well below the next milestone nothing is measured.
        """
        if not self.ahead:
            return
        now = self.copy()
        if kl_nats is None or kl_nats >= NEAR * self.ahead[0]:
            ratios_R = self.measure()
            while self.ahead and float(ratios_R.mean()) >= self.ahead[0]:
                self.keep(self._between(self.ahead.pop(0), now, ratios_R, step))
            self._put(now)
        self.before = now if self.ahead else None

    def _between(self, milestone: float, now: list[torch.Tensor], ratios_R: torch.Tensor, step: int) -> MilestonePolicy:
        """Put the policy nearest to the milestone in place; ``ratios_R`` are those of ``now``, which is beyond it."""
        nearest, low, high = (ratios_R, now), 0.0, 1.0
        for _ in range(MEASUREMENTS if self.before is not None else 0):
            if abs(float(nearest[0].mean()) - milestone) <= TOLERANCE * abs(milestone):
                break
            share = (low + high) / 2
            assert self.before is not None
            between = [a.lerp(b, share) for a, b in zip(self.before, now, strict=True)]
            self._put(between)
            tried_R = self.measure()
            low, high = (share, high) if float(tried_R.mean()) < milestone else (low, share)
            nearest = min(nearest, (tried_R, between), key=lambda tried: abs(float(tried[0].mean()) - milestone))
        kl_R, values = nearest
        self._put(values)
        error = float(kl_R.double().std()) / len(kl_R) ** 0.5
        return MilestonePolicy(milestone, float(kl_R.mean()), error, step)

    def missed(self, stage: str, say: Callable[[str], None]) -> dict[str, list[float]]:
        """For a stage's record, at its end: the milestones that training did not reach, which are said, too."""
        if self.ahead:
            values = ", ".join(f"{milestone:g}" for milestone in self.ahead)
            say(f"{stage}: no policy is kept for KL {values}: training did not get that far from the reference")
        return {"kl_milestones_missed": self.ahead}

    def save(self, folder: Path) -> None:
        """Write what a resumed training needs into a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {str(i): weight.contiguous() for i, weight in enumerate(self.before or [])}
        save_file(tensors, folder / MILESTONES_FILE, metadata={"ahead": json.dumps(self.ahead)})

    def load(self, folder: Path) -> None:
        """Go on as a checkpoint says."""
        with safe_open(folder / MILESTONES_FILE, framework="pt") as file:
            self.ahead = json.loads(file.metadata()["ahead"])
            self.before = [file.get_tensor(str(i)) for i in range(len(file.keys()))] if self.ahead else None
