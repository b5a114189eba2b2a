"""Sentences that stand beside a verdict: what it does not say by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def on_ended_responses(verdict: Row, rows: Sequence[Row]) -> str:
    """The win rate on the prompts where both arms ended their responses, by the judge that decided.

    ``rows`` are the win rates on these prompts. Empty where they are all prompts, or where no judge decided.
    """
    if not verdict["judges"] or not verdict["n_judged"]:
        return ""
    row = next((row for row in rows if row["judge"] == verdict["judge"]), None)
    if row is None or not row["n_judged"]:
        return f" On none of the {verdict['n_judged']} judged prompts did both arms end their responses."
    if row["n_judged"] >= verdict["n_judged"]:
        return ""
    interval = "no interval" if row["ci_low"] is None else f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
    share = f"the {row['n_judged']} of {verdict['n_judged']} prompts where both arms ended their responses"
    return f" On {share}, RM + PPO wins {row['win_rate']:.1%} ({interval})."
