"""duel: DPO versus reward model + PPO, paired. Imports nothing heavy until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.rewards import implicit_rewards

__all__ = ["implicit_rewards"]


def __getattr__(name: str) -> Any:
    if name == "implicit_rewards":
        from toolkit.rewards import implicit_rewards

        return implicit_rewards
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
