"""What PPO decides by the KL of its rollouts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from toolkit.ppo.config import PPOConfig
from toolkit.ppo.kl_control import KlControl, KlDecision

pytestmark = pytest.mark.invariant


def test_a_milestone_is_reached_once_and_several_at_a_time(tmp_path: Path) -> None:
    control = KlControl(PPOConfig(str(tmp_path), use_cpu=True, kl_milestones=[3.0, 1.0, 2.0]))
    decisions = [control.after_rollout(kl, 8).keep_policy for kl in (0.5, math.nan, 2.5, 2.5, 3.0, 9.0)]
    assert decisions == [False, False, True, False, True, False]
    assert control.milestones == []


def test_training_stops_above_the_limit(tmp_path: Path) -> None:
    control = KlControl(PPOConfig(str(tmp_path), use_cpu=True, max_kl=1.0))
    assert control.after_rollout(1.0, 8) == KlDecision(stop=False, keep_policy=False)
    assert control.after_rollout(1.1, 8) == KlDecision(stop=True, keep_policy=False)


def test_the_coefficient_moves_only_if_it_is_adaptive(tmp_path: Path) -> None:
    fixed = KlControl(PPOConfig(str(tmp_path), use_cpu=True, kl_coef=0.1))
    fixed.after_rollout(100.0, 1000)
    assert fixed.coef == 0.1
    adaptive = KlControl(PPOConfig(str(tmp_path), use_cpu=True, kl_coef=0.1, adaptive_kl=True))
    adaptive.after_rollout(100.0, 1000)
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.2 * 1000 / 10_000))
    adaptive.restore(0.3, [2.0])
    assert (adaptive.coef, adaptive.milestones) == (0.3, [2.0])
