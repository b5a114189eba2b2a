"""Runs side by side as tables: those below a folder, and those of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from toolkit.progress import duration
from toolkit.report.numbers import interval, number, percent
from toolkit.report.sheets import Sheet

WINNERS = {"rm_ppo": "RM + PPO", "dpo": "DPO", "undecided": "undecided", None: "-"}


def sweep_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """``duel sweep``."""
    sheet = Sheet("Sweep", ["settings", "RM + PPO over SFT", "DPO over SFT", "KL RM + PPO", "KL DPO", "verdict"])
    for row in rows:
        final = {point["policy"]: point for point in row["frontier"]}
        rates = [next(iter(final[arm]["win_rate_over_sft"].values()), None) for arm in ("rm_ppo", "dpo")]
        kl = [number(final[arm]["kl_nats"], 2) for arm in ("rm_ppo", "dpo")]
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "default"
        shares = [percent(rate["win_rate"] if rate else None) for rate in rates]
        sheet.add_row(settings, *shares, *kl, WINNERS[row["verdict"]["winner"]])
    return sheet


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
        sheet.add_row(*cells, WINNERS[row["winner"]], percent(row["win_rate"]), within, row["judge"] or "-")
    return sheet
