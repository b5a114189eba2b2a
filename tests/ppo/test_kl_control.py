"""What PPO decides by the KL of its rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.ppo.config import PPOConfig
from toolkit.ppo.kl_control import KlControl

pytestmark = pytest.mark.invariant


def test_training_stops_above_the_limit(tmp_path: Path) -> None:
    control = KlControl(PPOConfig(str(tmp_path), use_cpu=True, max_kl=1.0))
    assert [control.after_rollout(kl, 8, penalised_nats=9.0) for kl in (1.0, 1.1)] == [False, True]


def test_the_coefficient_moves_only_if_it_is_adaptive(tmp_path: Path) -> None:
    fixed = KlControl(PPOConfig(str(tmp_path), use_cpu=True, kl_coef=0.1))
    fixed.after_rollout(100.0, 1000, 100.0)
    assert fixed.coef == 0.1
    adaptive = KlControl(PPOConfig(str(tmp_path), use_cpu=True, kl_coef=0.1, adaptive_kl=True))
    adaptive.after_rollout(0.0, 1000, penalised_nats=100.0)  # it weighs this one
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.2 * 1000 / 10_000))
    adaptive.restore(0.3)
    assert adaptive.coef == 0.3
