"""A study's document as tables of text: for the terminal, and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.evals.study.matching import amount
from toolkit.evals.verdict import ARMS
from toolkit.report.names import arm_name
from toolkit.report.numbers import count, interval, number, percent, probability
from toolkit.report.sheets import Sheet
from toolkit.report.study_tables import COMPARISONS

_FINDINGS = {"better": "decided", "no practical difference": "no difference", "undecided": "undecided"}


def study_sheets(document: Mapping[str, Any]) -> list[Sheet]:
    """What the verdict rests on, in at most 80 columns."""
    verdict = document["verdict"]
    sheets = [_comparisons_sheet(verdict), _chosen_sheet(document)]
    if verdict["judges"]:
        sheets.append(_study_judges_sheet(verdict["judges"]))
    sheets += [_effort_sheet(document["effort"])] if document["effort"] else []
    sheets += [_controls_sheet(document["controls"])] if document["controls"] else []
    gap = [row for row in document["gap"] if row["measure"] == "win_rate"]
    lacking = [verdict["needed"][name] for name in COMPARISONS]
    can_be_told = any(row[key] is not None for row in lacking for key in ("n_prompts", "n_seeds"))
    return [*sheets, *([_gap_sheet(gap)] if gap else []), *([_needed_sheet(verdict)] if can_be_told else [])]


def _rate_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return percent(row["win_rate"]), interval(row["ci_low"], row["ci_high"]), probability(row["probability"])


def _comparisons_sheet(verdict: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(
        f"RM + PPO against DPO: {verdict['n_prompts']} test prompts, {verdict['n_seeds']} seeds",
        ["", "RM + PPO wins", "95% interval", "P(better)"],
    )
    rows = {label: verdict[name] for name, label in COMPARISONS.items()}
    for label, row in {**rows, "At equal wall time": verdict["matched_compute"]["wall_s"]}.items():
        sheet.add_row(label, *_rate_cells(row))
    return sheet


def _chosen_sheet(document: Mapping[str, Any]) -> Sheet:
    sheet = Sheet("Chosen on dev prompts", ["", "setting", "at", "KL", "tokens", "dev", "test"])
    rows = [(arm_name(arm), chosen) for arm, chosen in document["chosen"].items()]
    for name, row in [*rows, *((row["arm"], row["chosen"]) for row in document["controls"])]:
        tokens = amount("train_tokens", row["train_tokens"])
        place = (_short(row["setting"], 20), str(row["checkpoint"]), number(row["kl_nats"], 2), tokens)
        for judge, score in row["dev_score"].items():
            label = name if len(row["dev_score"]) == 1 else f"{name}, {judge}"
            sheet.add_row(_short(label, 20), *place, number(score, 2), number(row["test_score"][judge], 2))
    return sheet


def _study_judges_sheet(judges: Sequence[Mapping[str, Any]]) -> Sheet:
    sheet = Sheet("RM + PPO wins, by judge", ["judge", *COMPARISONS.values()])
    for row in judges:
        shares = [percent(row[name]["win_rate"]) for name in COMPARISONS]
        sheet.add_row(_short(row["judge"], 20), *shares)
    return sheet


def _effort_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    sheet = Sheet("Expected best of n trials", ["trials", "RM + PPO", "DPO", "RM + PPO wins", "95% interval"])
    shown = {1, 2, 3, 4, 6, 8, len(rows)} | {2**power for power in range(4, 12)}
    for row in (row for row in rows if row["n_trials"] in shown):
        scores = [number(row[arm]["score"] if row[arm] else None) for arm in ARMS]
        sheet.add_row(str(row["n_trials"]), *scores, *_rate_cells(row)[:2])
    return sheet


def _controls_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    sheet = Sheet("Against controls, best against best", ["control", "arm", "wins", "95% interval"])
    for row in rows:
        for arm in ARMS:
            sheet.add_row(_short(row["arm"], 20), arm_name(arm), *_rate_cells(row["win_rate_of"][arm])[:2])
    return sheet


def _gap_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """The gap by win rate. The steps add up to the whole; the others stand beside the way."""
    sheet = Sheet("Where the gap comes from, win rate over DPO", ["", "points", "95% interval", "P(above 0)"])
    for row in rows:
        step = f"{arm_name(row['from'])} to {arm_name(row['to'])}"
        label = {"total": f"all: {step}", "step": f"  {step}"}.get(row["kind"], f"beside: {step}")
        points = number(100 * row["difference"], 1, sign=True)
        bounds = interval(row["ci_low"], row["ci_high"], lambda value: number(100 * value, 1, sign=True))
        sheet.add_row(_short(label, 44), points, bounds, probability(row["probability"]))
    return sheet


def _needed_sheet(verdict: Mapping[str, Any]) -> Sheet:
    """For each comparison, the prompts that would decide it with the seeds as they are, and the other way round."""
    sheet = Sheet("What would decide", ["", "now", "test prompts", "or seeds"])
    for name, label in COMPARISONS.items():
        row = verdict["needed"][name]
        lacking = ["-" if row[key] is None else count(row[key]) for key in ("n_prompts", "n_seeds")]
        sheet.add_row(label, _FINDINGS[row["finding"]], *lacking)
    return sheet


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 2]}.."
