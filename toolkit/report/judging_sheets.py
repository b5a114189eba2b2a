"""Win rates and what is shown beside them, as tables: for the commands that judge, and from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.evals.prediction_powered import MIN_HUMAN
from toolkit.report.numbers import interval, number, percent
from toolkit.report.sheets import Sheet, estimate_cells, interval_heading, missing_estimates, win_rate_sheet


def judging_sheets(report: Mapping[str, Any]) -> list[Sheet]:
    """The tables of :func:`toolkit.judging.win_rates.report`: win rates, and those that it has beside them."""
    confidence = float(report["intervals"]["confidence"])
    rows = report["win_rates"]
    sheets = [win_rate_sheet([row for row in rows if row["slice"] is None], confidence)]
    sliced = [{**row, "policy": _policy_and_slice(row)} for row in rows if row["slice"] is not None]
    if sliced:
        sheets.append(win_rate_sheet(sliced, confidence))
    styled = [row for row in rows if row["sc_win_rate"] is not None]
    if styled:
        sheets.append(_style_sheet(styled, confidence))
    sheets += [_ranking_sheet(ranking, confidence) for ranking in report["bradley_terry"]]
    if report["judge_agreement"]:
        sheets.append(_judges_sheet(report["judge_agreement"], confidence))
    if report.get("prediction_powered"):
        sheets.append(_corrected_sheet(report["prediction_powered"], confidence))
    return sheets


def judging_notes(report: Mapping[str, Any]) -> list[str]:
    """Which estimates are missing and why, and which columns of files were read."""
    return [
        *missing_estimates(report["win_rates"]),
        *map(_left_out_line, report.get("prediction_powered_left_out", [])),
        *map(_columns_line, report.get("columns_read", [])),
    ]


def _policy_and_slice(row: Mapping[str, Any]) -> str:
    return str(row["policy"]) if row["slice"] is None else f"{row['policy']}, {row['slice']}"


def _left_out_line(pair: Mapping[str, Any]) -> str:
    """Which pair has too few votes to be corrected."""
    compared = f"{pair['policy']} against {pair['baseline']}, judge {pair['judge']}"
    return f"{compared}, is not corrected: people voted on {pair['n_votes']} of its prompts, and it takes {MIN_HUMAN}"


def _columns_line(read: Mapping[str, Any]) -> str:
    """Which columns a file's battles were read from."""
    names = ", ".join(f"{name} = {read[name]}" for name in ("prompt", "systems", "winner", "judge"))
    return f"{read['file']}: {names}" + (f"; {read['note']}" if read["note"] else "")


def _corrected_sheet(rows: Sequence[Mapping[str, Any]], confidence: float) -> Sheet:
    """Win rates of judges, corrected by people's votes, beside those of people alone."""
    bounds = interval_heading(confidence)
    columns = ["policy", "against", "judge", "corrected", bounds, "people alone", bounds, "judge alone", "bias"]
    sheet = Sheet("Corrected by people's votes", [*columns, "weight", "votes on"], n_keys=3)
    for row in rows:
        sheet.add_row(
            row["policy"],
            row["baseline"],
            row["judge"],
            percent(row["win_rate"]),
            interval(row["ci_low"], row["ci_high"]),
            percent(row["human_win_rate"]),
            interval(row["human_ci_low"], row["human_ci_high"]),
            percent(row["judge_win_rate"]),
            percent(row["bias"]),
            number(row["judge_weight"], 2),
            f"{row['n_human']} of {row['n_human'] + row['n_judge_only']}",
        )
    return sheet


def _style_sheet(rows: Sequence[Mapping[str, Any]], confidence: float) -> Sheet:
    effects = list(rows[0]["style_effects"])
    columns = ["policy", "against", "judge", "win rate", interval_heading(confidence), *effects]
    sheet = Sheet("At equal style", columns, n_keys=3)
    for row in rows:
        sheet.add_row(
            _policy_and_slice(row),
            row["baseline"],
            row["judge"],
            percent(row["sc_win_rate"]),
            interval(row["sc_ci_low"], row["sc_ci_high"]),
            *(number(row["style_effects"][name], 2) for name in effects),
        )
    return sheet


def _ranking_sheet(ranking: Mapping[str, Any], confidence: float) -> Sheet:
    sheet = Sheet(
        f"Bradley-Terry, judge {ranking['judge']}, {ranking['n_prompts']} prompts",
        ["policy", "log strength", interval_heading(confidence), "beats the others"],
    )
    for row in ranking["policies"]:
        bounds = interval(row["ci_low"], row["ci_high"], lambda value: number(value, 2))
        sheet.add_row(row["policy"], number(row["log_strength"], 2), bounds, percent(row["win_rate"]))
    return sheet


def _judges_sheet(agreement: Mapping[str, Any], confidence: float) -> Sheet:
    columns = ["judge", "with", "measure", "value", interval_heading(confidence), "comparisons"]
    sheet = Sheet("Judges", columns, n_keys=3)
    for row in agreement["against_reference"]:
        judges = (row["judge"], agreement["reference"])
        sheet.add_row(*judges, "accuracy", *estimate_cells(row["accuracy"], percent), str(row["n"]))
        sheet.add_row(*judges, "Cohen's kappa", *estimate_cells(row["cohen_kappa"], number), str(row["n_all"]))
    for row in agreement["pairs"]:
        sheet.add_row(*row["judges"], "same verdict", *estimate_cells(row["same_verdict"], percent), str(row["n"]))
        sheet.add_row(*row["judges"], "Cohen's kappa", *estimate_cells(row["cohen_kappa"], number), str(row["n"]))
    if agreement["krippendorff_alpha"] is not None:
        alpha = estimate_cells(agreement["krippendorff_alpha"], number)
        sheet.add_row("all", "", "Krippendorff's alpha", *alpha, "")
    return sheet
