"""duel: DPO versus reward model + PPO, paired. There is a function for every command.

``run``, ``sweep`` and ``study`` train. ``implicit_rewards``, ``score``, ``rm_card``, ``filter_rows`` and ``check`` look
at data and rewards. ``compare``, ``judge`` and ``winrate`` compare policies. ``label`` and ``simulate`` make preference
data. ``list_runs``, ``diff``, ``rerun``, ``write_report``, ``watch`` and ``push`` take runs that are there.
``recipes``, ``validate``, ``schema`` and ``env`` are about recipes and this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.api import (
        check,
        compare,
        diff,
        env,
        filter_rows,
        implicit_rewards,
        judge,
        label,
        list_runs,
        push,
        recipes,
        rerun,
        rm_card,
        run,
        schema,
        score,
        simulate,
        study,
        sweep,
        validate,
        watch,
        winrate,
        write_report,
    )

__all__ = [
    "check",
    "compare",
    "diff",
    "env",
    "filter_rows",
    "implicit_rewards",
    "judge",
    "label",
    "list_runs",
    "push",
    "recipes",
    "rerun",
    "rm_card",
    "run",
    "schema",
    "score",
    "simulate",
    "study",
    "sweep",
    "validate",
    "watch",
    "winrate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from toolkit import api

        return getattr(api, name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *globals()]
