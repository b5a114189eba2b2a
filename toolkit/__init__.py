"""duel: DPO versus reward model + PPO, paired. Nothing heavy is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.api import check, compare, filter_rows, implicit_rewards, rm_card, run, study

__all__ = ["check", "compare", "filter_rows", "implicit_rewards", "rm_card", "run", "study"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from toolkit import api

        return getattr(api, name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *globals()]
