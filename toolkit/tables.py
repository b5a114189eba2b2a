"""Results as tables for a terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def _text(*tables: Table | str) -> str:
    buffer = io.StringIO()
    # Wide enough that no number wraps; colour is for terminals, and this text may go to a file.
    console = Console(file=buffer, width=120, no_color=True, highlight=False)
    for table in tables:
        console.print(table, markup=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None, form: Any = percent) -> str:
    return "-" if low is None or high is None else f"{form(low)} to {form(high)}"


def win_rate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = _table(
        "Win rates",
        ["policy", "against", "judge", "win rate", "95% interval", "length-controlled", "p", "prompts", "failed"],
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
            str(row["n_failed"]),
        )
    return _text(table)


def result_tables(results: Mapping[str, Any]) -> str:
    """The end of a run: policies, win rates, what each arm cost, and the verdict last, where the eye is."""
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
    notes = [f"warning: {text}" for text in results["warnings"]]
    return "\n\n".join(
        [
            _text(policies),
            win_rate_table(final),
            _text(accuracy),
            _text(cost),
            *(["\n".join(notes)] if notes else []),
            results["verdict"]["sentence"],
        ]
    )


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
