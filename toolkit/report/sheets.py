"""Results as tables for a terminal."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.progress import duration


@dataclass
class Sheet:
    """A table for eyes: columns, and rows of text, the first column to the left and numbers to the right."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)


def _text(*sheets: Sheet) -> str:
    buffer = io.StringIO()
    # Wide enough that no number wraps; colour is for terminals, and this text may go to a file.
    console = Console(file=buffer, width=160, no_color=True, highlight=False)
    for sheet in sheets:
        table = Table(title=escape(sheet.title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def text_of(sheets: Sequence[Sheet]) -> str:
    """Sheets as text, a blank line between them."""
    return "\n\n".join(_text(sheet) for sheet in sheets)


def as_html(sheets: Sequence[Sheet], sentence: str = "") -> str:
    """Sheets as HTML tables, for a notebook. Every text is escaped."""
    parts = [f"<p>{html.escape(sentence)}</p>"] if sentence else []
    for sheet in sheets:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in sheet.columns)
        rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows)
        caption = f"<caption>{html.escape(sheet.title)}</caption>"
        parts.append(f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
    return "\n".join(parts)


def _table(title: str, columns: Sequence[str]) -> Sheet:
    return Sheet(title, columns)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None, form: Any = percent) -> str:
    return "-" if low is None or high is None else f"{form(low)} to {form(high)}"


def win_rate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _text(win_rate_sheet(rows))


def win_rate_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    table = _table(
        "Win rates",
        [
            "policy",
            "against",
            "judge",
            "win rate",
            "95% interval",
            "length-controlled",
            "p",
            "prompts",
            "tied",
            "failed",
        ],
    )
    for row in rows:
        p = row["p_value"]
        table.add_row(
            row["policy"],
            row["baseline"],
            row["judge"],
            percent(row["win_rate"]),
            interval(row["ci_low"], row["ci_high"]),
            percent(row["lc_win_rate"]),
            "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
            str(row["n_judged"]),
            str(row["n_tied"]),
            str(row["n_failed"]),
        )
    return table


def judging_tables(found: Mapping[str, Any]) -> str:
    """What ``duel winrate``, ``compare`` and ``judge`` say: win rates, and the further tables where there are any.

    Policies that are paths are named from the folder that they share, which then stands above the tables.
    """
    names = {row[side] for row in found["win_rates"] for side in ("policy", "baseline")}
    folder = _shared_folder(names)
    if folder:
        found = _renamed(found, {name: os.path.relpath(name, folder) for name in names})
    rows = found["win_rates"]
    parts = [f"Policies in {folder}"] if folder else []
    parts.append(win_rate_table([row for row in rows if row["slice"] is None]))
    sliced = [row for row in rows if row["slice"] is not None]
    if sliced:
        parts.append(win_rate_table([{**row, "policy": f"{row['policy']}, {row['slice']}"} for row in sliced]))
    styled = [row for row in rows if row["sc_win_rate"] is not None]
    if styled:
        effects = list(styled[0]["style_effects"])
        table = _table("At equal style", ["policy", "against", "judge", "win rate", "95% interval", *effects])
        for row in styled:
            table.add_row(
                row["policy"] + (f", {row['slice']}" if row["slice"] else ""),
                row["baseline"],
                row["judge"],
                percent(row["sc_win_rate"]),
                interval(row["sc_ci_low"], row["sc_ci_high"]),
                *(number(row["style_effects"][name], 2) for name in effects),
            )
        parts.append(_text(table))
    for ranking in found["bradley_terry"]:
        table = _table(
            f"Bradley-Terry, judge {ranking['judge']}, {ranking['n_prompts']} prompts",
            ["policy", "log strength", "95% interval", "beats the others"],
        )
        for row in ranking["policies"]:
            table.add_row(
                row["policy"],
                number(row["log_strength"], 2),
                interval(row["ci_low"], row["ci_high"], lambda value: number(value, 2)),
                percent(row["win_rate"]),
            )
        parts.append(_text(table))
    if found["judge_agreement"]:
        parts.append(_agreement_table(found["judge_agreement"]))
    return "\n\n".join(parts)


def _shared_folder(names: Collection[str]) -> str:
    """The folder that all names lie in; nothing where they are not all paths, or where one is inside another."""
    paths = [os.path.normpath(name) for name in names]
    # A hub's USER/NAME is no path.
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


def _agreement_table(found: Mapping[str, Any]) -> str:
    def both(value: Mapping[str, Any] | None, form: Any) -> tuple[str, str]:
        if value is None or value["value"] is None:
            return "-", "-"
        return form(value["value"]), interval(value["ci_low"], value["ci_high"], form)

    table = _table("Judges", ["judge", "with", "measure", "value", "95% interval", "comparisons"])
    for row in found["against_reference"]:
        against = (row["judge"], found["reference"])
        table.add_row(*against, "accuracy", *both(row["accuracy"], percent), str(row["n"]))
        table.add_row(*against, "Cohen's kappa", *both(row["cohen_kappa"], number), str(row["n_all"]))
    for row in found["pairs"]:
        table.add_row(*row["judges"], "same verdict", *both(row["same_verdict"], percent), str(row["n"]))
        table.add_row(*row["judges"], "Cohen's kappa", *both(row["cohen_kappa"], number), str(row["n"]))
    alpha = found["krippendorff_alpha"]
    if alpha is not None:
        table.add_row("all", "", "Krippendorff's alpha", *both(alpha, number), "")
    return _text(table)


def result_tables(results: Mapping[str, Any]) -> str:
    """The end of a run: policies, win rates, what each arm cost, and the verdict last, where the eye is."""
    notes = [f"warning: {text}" for text in results["warnings"]]
    return "\n\n".join(
        [
            text_of(result_sheets(results)),
            *(["\n".join(notes)] if notes else []),
            results["verdict"]["sentence"],
        ]
    )


def result_sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """Policies, win rates of the final ones, held-out accuracy, cost."""
    policies = _table(
        "Policies on held-out prompts", ["policy", "gold", "RM", "implicit", "KL (nats)", "tokens", "ended"]
    )
    for row in results["policies"]:
        policies.add_row(
            row["policy"],
            number(row["gold_reward"]["value"]),
            number(row["explicit_reward"]["value"]),
            number(row["implicit_reward"]["value"]),
            number(row["kl_nats"], 2),
            number(row["length_tokens"]["value"], 1),
            percent(row["eos_rate"]["value"]),
        )
    final = [row for row in results["win_rates"] if "@" not in row["policy"]]
    held_out = results["implicit_vs_explicit"]["held_out"]
    accuracy = _table("Held-out comparisons", ["reward", "accuracy", "95% interval"])
    for label, name in (
        ("explicit (RM)", "accuracy_explicit"),
        ("implicit (DPO)", "accuracy_implicit"),
        ("agreement", "agreement"),
    ):
        found = held_out[name]
        accuracy.add_row(label, percent(found["value"]), interval(found["ci_low"], found["ci_high"]))
    cost = _table("Cost", ["stage", "arm", "seconds", "tokens", "peak GiB"])
    for row in results["cost"]["stages"]:
        cost.add_row(
            row["stage"], row["arm"], number(row["wall_s"], 1), f"{row['tokens']:,}", number(row["peak_gib"], 2)
        )
    return [policies, win_rate_sheet(final), accuracy, cost]


def rewards_table(summary: Mapping[str, Any]) -> str:
    """The summary of ``duel rewards`` and ``duel score``."""
    lines = [
        f"{summary['n_responses']} responses to {summary['n_prompts']} prompts in {summary['seconds']:.1f} s "
        f"({summary['responses_per_second']:.1f} a second)",
        f"{summary['n_long_prompts']} prompts too long and left out, {summary['n_truncated_responses']} responses cut",
    ]
    if summary["accuracy"] is not None:
        low, high = summary["accuracy_ci"]
        lines.append(
            f"pairwise accuracy {percent(summary['accuracy'])} ({interval(low, high)}, "
            f"{summary['n_comparisons']} comparisons)"
        )
    if summary.get("quality") is not None:
        quality = summary["quality"]
        margin = quality["margin_mean"]
        lines.append(
            f"margin towards the preferred {number(margin['value'])} "
            f"({interval(margin['ci_low'], margin['ci_high'], number)}), read as sigmoid(margin): "
            f"NLL {number(quality['nll'])}, Brier {number(quality['brier'])}, ECE {number(quality['ece'])}, "
            f"temperature {number(quality['temperature'])}"
        )
    if summary.get("reference_free"):
        lines.append("reference-free: the rewards are beta * log pi, without a reference")
    if "implicit_vs_explicit" in summary:
        lines += _against(summary["implicit_vs_explicit"])
        lines.append(f"{summary['n_disagreements']} pairs ordered unlike, with their text: {summary['disagreements']}")
    if "warning" in summary:
        lines.append(f"note: {summary['warning']}")
    return "\n".join([*lines, f"written: {summary['out']}"])


def rewards_sheets(summary: Mapping[str, Any]) -> list[Sheet]:
    """The summary of ``implicit_rewards`` for a notebook."""
    table = _table("Implicit rewards", ["", "value", "95% interval"])
    for name in ("n_prompts", "n_responses", "beta", "seconds", "responses_per_second"):
        table.add_row(name.replace("_", " "), f"{summary[name]:,.4g}", "")
    if summary["accuracy"] is not None:
        table.add_row("pairwise accuracy", percent(summary["accuracy"]), interval(*summary["accuracy_ci"]))
    against = _table("Implicit against explicit, within prompts", ["", "value", "95% interval"])
    for name, found in summary.get("implicit_vs_explicit", {}).items():
        if isinstance(found, Mapping) and found.get("value") is not None and "ci_low" in found:
            cells = (number(found["value"]), interval(found["ci_low"], found["ci_high"], number))
            against.add_row(name.replace("_", " "), *cells)
    return [table, *([against] if against.rows else [])]


def _against(found: Mapping[str, Any]) -> list[str]:
    """The check of implicit against explicit rewards: as a whole, calibration, and by slice."""
    table = _table("Implicit against explicit", ["", "value", "95% interval"])
    rows = {name: entry for name, entry in found.items() if isinstance(entry, Mapping) and "value" in entry}
    for reward, entries in found.get("calibration", {}).items():
        rows |= {f"{name} of {reward}": entry for name, entry in entries.items()}
    for name, entry in rows.items():
        table.add_row(name, number(entry["value"]), interval(entry["ci_low"], entry["ci_high"], number))
    tables = [_text(table)]
    for name, slices in found.get("splits", {}).items():
        table = _table(f"By {name.replace('_', ' ')}", ["from", "to", "pairs", "explicit", "implicit", "agreement"])
        for row in slices:
            shares = [percent(row[key]["value"]) for key in ("accuracy_explicit", "accuracy_implicit", "agreement")]
            table.add_row(f"{row['low']:.3g}", f"{row['high']:.3g}", str(row["n_pairs"]), *shares)
        tables.append(_text(table))
    if "samples" in found:
        table = _table("On samples of", ["", "pairs", "explicit", "implicit", "agreement", "kappa"])
        for source, row in found["samples"].items():
            names = ("accuracy_explicit", "accuracy_implicit", "agreement")
            shares = [percent(row[name]["value"]) if name in row else "-" for name in names]
            table.add_row(source, str(row["n_pairs"]), *shares, number(row["cohen_kappa"]["value"]))
        tables.append(_text(table))
    return tables


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = _table("Sweep", ["settings", "PPO over SFT", "DPO over SFT", "KL PPO", "KL DPO", "verdict"])
    for row in rows:
        final = {point["policy"]: point for point in row["frontier"]}
        cells = []
        for arm in ("rm_ppo", "dpo"):
            rates = list(final[arm]["win_rate_over_sft"].values())
            cells.append(percent(rates[0]["win_rate"]) if rates else "-")
        label = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "default"
        kl = [number(final[arm]["kl_nats"], 2) for arm in ("rm_ppo", "dpo")]
        table.add_row(label, *cells, *kl, row["verdict"]["winner"])
    return _text(table)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``duel runs``."""
    table = _table("Runs", ["run", "recipe", "seed", "status", "stages", "time", "started", "better", "RM + PPO wins"])
    winners = {"rm_ppo": "RM + PPO", "dpo": "DPO", "undecided": "undecided", None: "-"}
    for row in rows:
        state = row["status"] if row["status"] == "done" or not row["stage"] else f"{row['status']}, {row['stage']}"
        rate = "-"
        if row["win_rate"] is not None:
            rate = f"{percent(row['win_rate'])} ({interval(row['ci_low'], row['ci_high'])}, {row['judge']})"
        started = f"{datetime.fromtimestamp(row['started']):%Y-%m-%d %H:%M}"
        stages = f"{row['stages_done']}/{row['stages']}"
        cells = (row["run"], row["recipe"], str(row["seed"]), state, stages, duration(row["wall_s"]), started)
        table.add_row(*cells, winners[row["winner"]], rate)
    return _text(table)


def diff_tables(found: Mapping[str, Any]) -> str:
    """``duel diff``."""
    first, second = found["runs"]
    parts = []
    for title, key in (("Settings that differ", "settings"), ("Versions that differ", "versions")):
        table = _table(title, ["", first, second])
        for name, values in found[key].items():
            table.add_row(name, *("-" if value is None else str(value) for value in values))
        parts.append(_text(table) if table.rows else f"{title}: none")
    same = [stage for stage, equal in found["stages"].items() if equal]
    parts.append(f"stages with the same result: {', '.join(same) or 'none'}")
    results = _table("Results (intervals are each run's own)", ["", first, second])
    for row in found["results"]:
        results.add_row(row["name"], *(_cell(row[side]) for side in ("first", "second")))
    return "\n\n".join([*parts, *([_text(results)] if results.rows else [])])


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    form = percent if entry["unit"] == "rate" else number
    known = entry.get("ci_low") is not None and entry.get("ci_high") is not None
    return form(entry["value"]) + (f" ({interval(entry['ci_low'], entry['ci_high'], form)})" if known else "")
