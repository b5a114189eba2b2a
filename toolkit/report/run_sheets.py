"""Runs side by side as tables: those below a folder, and those of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from toolkit.evals.verdict import ARMS
from toolkit.progress import duration
from toolkit.report.names import ARM_NAMES
from toolkit.report.numbers import interval, number, percent
from toolkit.report.sheets import Sheet


def sweep_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """``duel sweep``. The win rates are by the judge of the verdict; there are none where no judge may decide."""
    columns = ["RM + PPO over SFT", "DPO over SFT", "judge", "KL RM + PPO", "KL DPO", "verdict"]
    sheet = Sheet("Sweep", ["settings", *columns])
    for row in rows:
        final = {point["policy"]: point for point in row["frontier"]}
        judges = deciding(row["verdict"])
        shares = [percent(_mean_rate(final[arm]["win_rate_over_sft"], judges)) for arm in ARMS]
        kl = [number(final[arm]["kl_nats"], 2) for arm in ARMS]
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "default"
        judge = judges[0] if len(judges) == 1 else f"mean of {', '.join(judges)}" if judges else "-"
        sheet.add_row(settings, *shares, judge, *kl, winner(row["verdict"]["winner"]))
    return sheet


def deciding(verdict: Mapping[str, Any]) -> list[str]:
    """The judges that a verdict rests on: one, several that are averaged, or none that may decide.

    >>> deciding({"judge": "gold", "judges": {"gold": 0.6, "llm:m": 0.4}})
    ['gold']
    >>> deciding({"judge": "all judges", "judges": {"gold": 0.6, "llm:m": 0.4}})
    ['gold', 'llm:m']
    >>> deciding({"judge": "rm", "judges": {}})
    []
    """
    judges = list(verdict["judges"])
    return [verdict["judge"]] if verdict["judge"] in judges else judges


def _mean_rate(rates: Mapping[str, Mapping[str, Any]], judges: Sequence[str]) -> float | None:
    """The win rate by these judges; None where one of them has none."""
    values = [rates[judge]["win_rate"] if judge in rates else None for judge in judges]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def winner(name: str | None) -> str:
    """The better arm for readers."""
    return "-" if name is None else ARM_NAMES.get(name, name)


def runs_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """``duel runs``."""
    columns = ["run", "recipe", "seed", "status", "stages", "time", "started", "better"]
    sheet = Sheet("Runs", [*columns, "RM + PPO wins", "interval", "judge"])
    for row in rows:
        status = row["status"] if row["status"] == "done" or not row["stage"] else f"{row['status']}, {row['stage']}"
        within = interval(row["ci_low"], row["ci_high"])
        started = f"{datetime.fromtimestamp(row['started']):%Y-%m-%d %H:%M}"
        stages = f"{row['stages_done']}/{row['stages']}" + (" trials" if row["kind"] == "study" else "")
        seed = "-" if row["seed"] is None else str(row["seed"])
        cells = (row["run"], row["recipe"] or "-", seed, status, stages, duration(row["wall_s"]), started)
        sheet.add_row(*cells, winner(row["winner"]), percent(row["win_rate"]), within, row["judge"] or "-")
    return sheet
