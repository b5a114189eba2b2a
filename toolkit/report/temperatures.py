"""The report's table of win rates by sampling temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.report.reading import ResultRow

PAIRS = (("rm_ppo", "dpo"), ("rm_ppo", "sft"), ("dpo", "sft"))


@dataclass(frozen=True)
class TemperatureRow:
    """One temperature by one judge: the rows of the three comparisons, None where there is none.

    ``decides``: the verdict is for this temperature. ``kl`` has the policies' rows by name.
    """

    temperature: float
    judge: str
    decides: bool
    kl: dict[str, ResultRow]
    arms: ResultRow | None
    ppo_over_sft: ResultRow | None
    dpo_over_sft: ResultRow | None


@dataclass(frozen=True)
class TemperatureTable:
    """``changes`` are sentences about temperatures at which the other arm is ahead."""

    rows: list[TemperatureRow]
    changes: list[str]


def temperature_table(results: Mapping[str, Any]) -> TemperatureTable | None:
    """Win rates side by side, in order of temperature. None where a run has one temperature alone."""
    entries: Sequence[ResultRow] = results.get("temperatures", [])
    if not entries:
        return None
    rows = []
    for entry in entries:
        policies = {row["policy"]: row for row in entry["policies"]}
        for judge in dict.fromkeys(row["judge"] for row in entry["win_rates"]) or [""]:
            of_judge = {(row["policy"], row["baseline"]): row for row in entry["win_rates"] if row["judge"] == judge}
            rates = (of_judge.get(pair) for pair in PAIRS)
            rows.append(TemperatureRow(entry["temperature"], judge, entry["verdict"], policies, *rates))
    changes = [entry["order_change"]["sentence"] for entry in entries if entry["order_change"]]
    return TemperatureTable(rows, changes)
