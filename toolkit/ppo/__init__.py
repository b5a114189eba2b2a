"""PPO for language models: ``from toolkit.ppo import PPOConfig, PPOTrainer, Ensemble``. Heavy imports wait for use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.ppo.config import PPOConfig
    from toolkit.ppo.rewards import Ensemble
    from toolkit.ppo.trainer import PPOTrainer

__all__ = ["Ensemble", "PPOConfig", "PPOTrainer"]
_HOMES = {"PPOConfig": "config", "PPOTrainer": "trainer", "Ensemble": "rewards"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"toolkit.ppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'toolkit.ppo' has no attribute {name!r}")
