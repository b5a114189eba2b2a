"""What the commands print on the terminal for people: tables and sentences."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.cli.next_steps import next_recipe
from toolkit.cli.options import wrapped
from toolkit.report.card_sheets import card_sheets, flag_lines, trained_on
from toolkit.report.judging_sheets import judging_notes, judging_sheets
from toolkit.report.numbers import interval, number, percent
from toolkit.report.run_sheets import runs_sheet, sweep_sheet
from toolkit.report.sheets import (
    Sheet,
    estimate_cells,
    filter_sheet,
    result_sheets,
    text_of,
)
from toolkit.report.study_sheets import study_sheets


def result_tables(results: Mapping[str, Any]) -> str:
    """The end of ``duel run``: tables, warnings, and the verdict last, where the reader's eye is."""
    changes = [entry["order_change"] for entry in results.get("temperatures", []) if entry["order_change"]]
    notes = [f"note: {change['sentence']}" for change in changes if not change["sure"]]  # a sure one is a warning
    warnings = "\n".join(map(wrapped, [*notes, *(f"warning: {text}" for text in results["warnings"])]))
    verdict = results["verdict"]
    beside = [results["cost"].get("sentence", ""), f"Next: {verdict['next_step']}" if "next_step" in verdict else ""]
    end = "\n".join(wrapped(text, 0) for text in [verdict["sentence"], *beside] if text)
    return "\n\n".join(filter(None, [text_of(*result_sheets(results)), warnings, end]))


def held_out_line(accuracy: Mapping[str, Any]) -> str:
    """The end of ``duel run --until reward_model``."""
    bounds = interval(*accuracy["accuracy_ci"])
    return wrapped(
        f"The reward model is right in {percent(accuracy['accuracy'])} of {accuracy['n_comparisons']:,} held-out "
        f"comparisons (interval {bounds}, {accuracy['n_prompts']:,} prompts)."
    )


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``duel sweep``."""
    return text_of(sweep_sheet(rows))


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``duel runs``."""
    return text_of(runs_sheet(rows))


def diff_tables(difference: Mapping[str, Any]) -> str:
    """``duel diff``."""
    first, second = difference["runs"]
    parts = []
    for title, key in (("Settings that differ", "settings"), ("Versions that differ", "versions")):
        sheet = Sheet(title, ["", first, second])
        for name, values in difference[key].items():
            sheet.add_row(name, *("-" if value is None else str(value) for value in values))
        parts.append(text_of(sheet) if sheet.rows else f"{title}: none")
    stages = difference["stages"]
    same = [stage for stage, entry in stages.items() if entry["equal"]]
    parts.append(f"stages with the same result: {', '.join(same) or 'none'}")
    if unknown := [stage for stage, entry in stages.items() if entry["equal"] is entry["missing_in"] is None]:
        parts.append(f"stages without hashes of their results: {', '.join(unknown)}")
    for side, folder in (("first", first), ("second", second)):
        if lacking := [stage for stage, entry in stages.items() if entry["missing_in"] == side]:
            parts.append(f"stages that {folder} does not have: {', '.join(lacking)}")
    results = Sheet("Results (each interval is of one run alone)", ["", first, second])
    for row in difference["results"]:
        results.add_row(row["name"], *(_with_interval(row[side]) for side in ("first", "second")))
    return "\n\n".join([*parts, *([text_of(results)] if results.rows else [])])


def rerun_tables(compared: Mapping[str, Any]) -> str:
    """``duel rerun``."""
    machine = dict(compared["machine"])
    for stage, facts in compared["compute"].items():
        for name, values in facts.items():
            known = machine.setdefault(name, values)
            machine |= {} if known == values else {f"{name} of {stage}": values}
    parts = []
    for title, values_by_name in (("Versions that differ", compared["versions"]), ("Machine that differs", machine)):
        sheet = Sheet(title, ["", "then", "now"])
        for name, values in values_by_name.items():
            sheet.add_row(name, *("-" if value in (None, []) else str(value) for value in values))
        parts.append(text_of(sheet) if sheet.rows else f"{title}: none")
    changed = "; ".join(f"{stage} ({', '.join(names)})" for stage, names in compared["inputs"].items())
    parts.append(f"Code, data and models that changed since: {changed or 'none'}")
    results = Sheet("Results that differ (each interval is of one run alone)", ["", "then", "now"])
    for row in compared["results"]:
        results.add_row(row["name"], *(_with_interval(row[side]) for side in ("first", "second")))
    parts += [text_of(results)] if results.rows else []
    unequal = {
        name: entry["files_that_differ"] for name, entry in compared["stages"].items() if entry["equal"] is False
    }
    if compared["equal"] is None:
        said = "The original has no hashes of its weights and tables: an earlier version wrote it."
    elif unequal:
        said = "Not equal: " + "; ".join(f"{stage} ({', '.join(names[:3])})" for stage, names in unequal.items())
    else:
        said = "Equal, bit for bit: all weights and tables."
    return "\n\n".join([*parts, f"{said}\nrun: {compared['run']}"])


def _with_interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    form = percent if entry["unit"] == "rate" else number
    known = entry.get("ci_low") is not None and entry.get("ci_high") is not None
    return form(entry["value"]) + (f" ({interval(entry['ci_low'], entry['ci_high'], form)})" if known else "")


# ---------------------------------------------------------------- judgements


def judging_tables(report: Mapping[str, Any]) -> str:
    """``duel winrate``, ``compare`` and ``judge``: win rates, and the other tables where there are any.

    Policies that are paths are named from the folder that they share, which then stands above the tables.
    """
    names = {row[side] for row in report["win_rates"] for side in ("policy", "baseline")}
    folder = _shared_folder(names)
    if folder:
        report = _renamed(report, {name: os.path.relpath(name, folder) for name in names})
    notes = "\n".join(wrapped(f"note: {text}") for text in judging_notes(report))
    heading = f"Policies in {folder}" if folder else ""
    return "\n\n".join(filter(None, [heading, text_of(*judging_sheets(report)), notes]))


def _shared_folder(names: Collection[str]) -> str:
    """The folder that all names lie in. Empty where they are not all paths, or where one is inside another."""
    paths = [os.path.normpath(name) for name in names]
    # USER/NAME on the hub is not a path.
    if len(names) < 2 or not all(os.path.isabs(path) or path.count(os.sep) > 1 for path in paths):
        return ""
    if len({os.path.isabs(path) for path in paths}) > 1 or len(set(paths)) < len(names):
        return ""
    folder = os.path.commonpath(paths)
    return "" if folder in (*paths, os.sep) else folder


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, Mapping):
        return {key: _renamed(inside, names) for key, inside in value.items()}
    return [_renamed(inside, names) for inside in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- rewards


def rewards_table(summary: Mapping[str, Any]) -> str:
    """``duel rewards`` and ``duel score``."""
    lines = [
        f"scored {summary['n_responses']} responses to {summary['n_prompts']} prompts in {summary['seconds']:.1f} s "
        f"({summary['responses_per_second']:.1f} per second)",
        f"left out {summary['n_long_prompts']} prompts that are too long, "
        f"cut {summary['n_truncated_responses']} responses at the limit",
    ]
    if "implicit_reward" in summary and not summary["reference_free"]:
        lines.append(f"the implicit reward: {summary['implicit_reward']}")
    if summary["accuracy"] is not None:
        lines.append(
            f"pairwise accuracy {percent(summary['accuracy'])} ({interval(*summary['accuracy_ci'])}, "
            f"{summary['n_comparisons']} comparisons)"
        )
    if summary.get("quality") is not None:
        quality = summary["quality"]
        value, bounds = estimate_cells(quality["margin_mean"], number)
        lines.append(
            f"mean margin of the preferred response {value} ({bounds}); with sigmoid(margin) as probability: "
            f"NLL {number(quality['nll'])}, Brier {number(quality['brier'])}, ECE {number(quality['ece'])}, "
            f"temperature {number(quality['temperature'])}"
        )
        lines.append(_references_line(quality["references"]))
    lines = list(map(wrapped, lines))
    if summary["accuracy"] is not None and summary["n_trained_prompts"]:
        lines.append(wrapped(f"note: {trained_on(summary['n_trained_prompts'], summary['n_prompts'])}"))
    if summary.get("reference_free"):
        lines.append("reference-free: the rewards are beta * log pi, without a reference")
    if "implicit_vs_explicit" in summary:
        lines.append(text_of(*_implicit_against_explicit(summary["implicit_vs_explicit"])))
        n_pairs, path = summary["n_disagreements"], summary["disagreements"]
        lines.append(wrapped(f"the two rewards order {n_pairs} pairs differently: {path} has their texts"))
    if "shifts" in summary:
        lines.append(text_of(_shift_sheet(summary["shifts"])))
    if "warning" in summary:
        lines.append(wrapped(f"note: {summary['warning']}"))
    return "\n".join([*lines, f"written: {summary['out']}"])


def _shift_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Accuracy on shifted comparisons, and what it loses against that on the data."""
    names = ("explicit", "implicit", "drop_explicit", "drop_implicit", "difference_of_drops")
    header = ["", "pairs", "explicit", "implicit", "explicit loses", "implicit loses", "implicit loses more by"]
    sheet = Sheet("Accuracy on shifted comparisons", header)
    for row in rows:
        cells = [
            f"{percent(cell['value'])} ({interval(cell['ci_low'], cell['ci_high'])})" if cell is not None else "-"
            for cell in (row[name] for name in names)
        ]
        sheet.add_row(row["name"], str(row["n"]), *cells)
    return sheet


def card_text(card: Mapping[str, Any], out: Path | None) -> str:
    """``duel rm-card``; ``out`` is the folder that the card was written to."""
    written = f"written: {out}" if out is not None else ""
    return "\n\n".join(filter(None, [text_of(*card_sheets(card)), "\n".join(map(wrapped, flag_lines(card))), written]))


def filter_table(summary: Mapping[str, Any]) -> str:
    """``duel filter``."""
    n = summary["n_kept"] + summary["n_dropped"]
    lines = [
        text_of(filter_sheet(summary)),
        f"kept {summary['n_kept']} of {n} rows: {summary['out']}",
        f"dropped {summary['n_dropped']}: {summary['dropped']}",
    ]
    if summary["n_unscored"]:
        lines.append(f"{summary['n_unscored']} of them have no score: a blank text, or responses that share no prompt")
    if not summary["recall"]["value"]:
        lines.append("note: no good response of the calibration set passes")
    if summary["n_trained_prompts"]:
        lines.append(
            wrapped(
                f"warning: the judge was trained on {summary['n_trained_prompts']} prompts of the calibration set, so "
                "the rate on new data may be another: calibrate on held-out rows, such as data/eval.parquet of its run"
            )
        )
    if summary.get("preference_data") and summary["n_kept"]:
        lines.append(next_recipe(summary["out"]))
    elif summary["n_dropped"]:
        lines.append(wrapped(f"Next: read some rows of {summary['dropped']}, to see what the judge scores low"))
    return "\n".join(lines)


def _references_line(references: Mapping[str, Any]) -> str:
    """What accuracy, log loss and Brier score are to be compared with."""
    coin, best = references["coin"], references["label_ceiling"]
    line = f"for comparison: a coin has accuracy {percent(coin['accuracy'])}, NLL {number(coin['nll'])}, Brier "
    line += number(coin["brier"])
    if best is None:
        return f"{line}; the best possible is not known ({references['label_ceiling_reason']})"
    values = [percent(best["accuracy"]["value"]), *(number(best[name]["value"]) for name in ("nll", "brier"))]
    return f"{line}; the best that these labels allow is {', '.join(values)}"


def _implicit_against_explicit(check: Mapping[str, Any]) -> list[Sheet]:
    """The check of implicit against explicit rewards: as a whole with calibration, by slice, and on samples."""
    overall = Sheet("Implicit against explicit", ["", "value", "95% interval"])
    rows = {name: entry for name, entry in check.items() if isinstance(entry, Mapping) and "value" in entry}
    for reward, entries in check.get("calibration", {}).items():
        rows |= {f"{name} of {reward}": entry for name, entry in entries.items()}
    for name, entry in rows.items():
        overall.add_row(name, number(entry["value"]), interval(entry["ci_low"], entry["ci_high"], number))
    sheets = [overall]
    measures = ("accuracy_explicit", "accuracy_implicit", "agreement")
    for name, slices in check.get("splits", {}).items():
        sheet = Sheet(
            f"By {name.replace('_', ' ')}", ["from", "to", "pairs", "explicit", "implicit", "agreement"], n_keys=2
        )
        for row in slices:
            shares = [percent(row[measure]["value"]) for measure in measures]
            sheet.add_row(f"{row['low']:.3g}", f"{row['high']:.3g}", str(row["n_pairs"]), *shares)
        sheets.append(sheet)
    if "samples" in check:
        sheet = Sheet("On samples of", ["", "pairs", "equal texts", "explicit", "implicit", "agreement", "kappa"])
        for policy, row in check["samples"].items():
            shares = [percent(row[measure]["value"] if measure in row else None) for measure in measures]
            equal = str(row.get("n_pairs_equal", "-"))  # an earlier duel counted them among the pairs
            sheet.add_row(policy, str(row["n_pairs"]), equal, *shares, number(row["cohen_kappa"]["value"]))
        sheets.append(sheet)
    return sheets


def labels_table(summary: Mapping[str, Any]) -> str:
    """``duel label``."""
    rows = {
        "prompts": f"{summary['n_prompts']:,}",
        "prompts left out": f"{summary['n_prompts_left_out']:,}",
        "responses": f"{summary['n_responses']:,}",
        "comparisons": f"{summary['n_comparisons']:,}",
        "of them ties": f"{summary['n_tied']:,}",
        "failed": f"{summary['n_failed']:,}",
    }
    usage = summary["judge_usage"]
    if usage is not None:
        rows |= {
            "changed with the order": f"{summary['n_inconsistent']:,}",
            "principles": f"{summary['n_principles']:,}",
            "prompt tokens": f"{usage['prompt_tokens']:,}",
            "completion tokens": f"{usage['completion_tokens']:,}",
        }
        rows |= {"cost, USD": f"{usage['cost_usd']:.4f}"} if usage["cost_usd"] is not None else {}
    return _written_data("Labels", rows, summary["out"])


def simulation_table(summary: Mapping[str, Any]) -> str:
    """``duel simulate``."""
    rows = {
        "prompts": f"{summary['n_prompts']:,}",
        "prompts left out": f"{summary['n_prompts_left_out']:,}",
        "responses": f"{summary['n_responses']:,}",
        "comparisons": f"{summary['n_comparisons']:,}",
        "annotators": summary["annotators"],
        "agreement of two": percent(summary["agreement_of_two_annotators"]),
        "gold rewards": "of the data" if summary["gold"] == "data" else "of the shipped function",
    }
    return _written_data("Simulated labels", rows, summary["out"])


def _written_data(title: str, rows: Mapping[str, str], out: str) -> str:
    sheet = Sheet(title, ["", "value"])
    for name, value in rows.items():
        sheet.add_row(name, value)
    return f"{text_of(sheet)}\n\nwritten: {out}\n{next_recipe(out)}"


# ---------------------------------------------------------------- studies


def study_tables(document: Mapping[str, Any]) -> str:
    """``duel study``: the sentence, what it rests on, and the warnings, for a terminal of 80 columns."""
    warnings = [wrapped(f"warning: {text}") for text in document["warnings"]]
    sentence = wrapped(document["verdict"]["sentence"], 0)
    return "\n\n".join([sentence, text_of(*study_sheets(document)), *warnings])
