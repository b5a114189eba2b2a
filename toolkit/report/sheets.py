"""Results as tables of text: for the terminal, and for notebooks as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.evals.words import ARM_NAMES, on_fewer_prompts, policy_name
from toolkit.report.folding import folded, terminal_width
from toolkit.report.numbers import confidence_level, count, interval, length_control_name, number, p_value, percent
from toolkit.report.rounds import RoundTable, round_table
from toolkit.report.temperatures import TemperatureTable, temperature_table


@dataclass
class Sheet:
    """A table to look at: a title, the names of the columns, and rows of text.

    The first ``n_keys`` columns name the row. A table that is folded has them in each of its blocks.
    """

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    n_keys: int = 1

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)


def text_of(*sheets: Sheet, width: int | None = None) -> str:
    """Sheets as text, with a blank line between them. The first column stands to the left, the others to the right.

    A row is no wider than ``width``, by default the terminal's.
    """
    columns = width or terminal_width()
    return "\n\n".join(folded(sheet.title, sheet.columns, sheet.rows, sheet.n_keys, columns) for sheet in sheets)


def html_of(*sheets: Sheet, sentence: str = "") -> str:
    """Sheets as HTML tables, below a sentence. Every text is escaped."""
    parts = [f"<p>{html.escape(sentence)}</p>"] if sentence else []
    for sheet in sheets:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in sheet.columns)
        rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows)
        caption = f"<caption>{html.escape(sheet.title)}</caption>"
        parts.append(f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
    return "\n".join(parts)


def estimate_cells(estimate: Mapping[str, Any] | None, form: Callable[[float], str]) -> tuple[str, str]:
    """The value and the interval of an estimate ``{value, ci_low, ci_high}``, which may be None."""
    if estimate is None or estimate["value"] is None:
        return "-", "-"
    return form(estimate["value"]), interval(estimate["ci_low"], estimate["ci_high"], form)


def interval_heading(confidence: float) -> str:
    """The heading of a column of intervals.

    >>> interval_heading(0.95)
    '95% interval'
    """
    return f"{confidence_level(confidence)} interval"


def win_rate_sheet(rows: Sequence[Mapping[str, Any]], confidence: float = 0.95, *, title: str = "Win rates") -> Sheet:
    """Length-controlled win rates have columns where they were asked for, with their variant in the heading."""
    bounds = interval_heading(confidence)
    asked = any(row["lc_win_rate"] is not None or row.get("lc_variant") for row in rows)
    heading = ", ".join(filter(None, ["length-controlled", length_control_name(rows)]))
    controlled = [heading, bounds] if asked else []
    columns = ["policy", "against", "judge", "win rate", bounds, *controlled, "p", "prompts", "tied", "failed"]
    sheet = Sheet(title, columns, n_keys=3)
    for row in rows:
        sheet.add_row(
            row["policy"],
            row["baseline"],
            row["judge"],
            percent(row["win_rate"]),
            interval(row["ci_low"], row["ci_high"]),
            *([percent(row["lc_win_rate"]), interval(row["lc_ci_low"], row["lc_ci_high"])] if asked else []),
            p_value(row["p_value"]),
            str(row["n_judged"]),
            str(row["n_tied"]),
            str(row["n_failed"]),
        )
    return sheet


def missing_estimates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason why rows have no win rate at equal length or equal style."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    for control, key in (("length-controlled", "lc_reason"), ("style-controlled", "sc_reason")):
        for row in rows:
            if row.get(key):
                name = f"{row['policy']} against {row['baseline']}, judge {row['judge']}"
                rows_of.setdefault((row[key], control), []).append(name)
    controls: dict[tuple[str, str], list[str]] = {}
    for (reason, control), names in rows_of.items():
        controls.setdefault((reason, "; ".join(names)), []).append(f"no {control}")
    return [f"{' and '.join(without)} win rate: {reason} ({names})" for (reason, names), without in controls.items()]


def result_sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """Policies, win rates of the final ones, judges' tests, held-out accuracy, and cost, from ``results.json``."""
    confidence = float(results["recipe"]["evaluate"]["confidence"])
    fewer = on_fewer_prompts(results["policies"])
    title = "Policies on held-out prompts" + (f" ({fewer})" if fewer else "")
    rewards = {"gold": "gold_reward", "RM": "explicit_reward", "implicit": "implicit_reward"}
    known = {
        name: key for name, key in rewards.items() if any(r[key]["value"] is not None for r in results["policies"])
    }
    policies = Sheet(title, ["policy", *known, "KL (nats)", "tokens", "ended"])
    for row in results["policies"]:
        policies.add_row(
            policy_name(row["policy"]),
            *(number(row[key]["value"]) for key in known.values()),
            number(row["kl_nats"], 2),
            number(row["length_tokens"]["value"], 1),
            percent(row["eos_rate"]["value"]),
        )
    final = with_names([row for row in results["win_rates"] if "@" not in row["policy"]])
    ended = with_names(results["verdict"].get("both_ended", []))
    shown = [win_rate_sheet(ended, confidence, title="Where both arms ended their responses")] if ended else []
    cost = Sheet("Cost", ["stage", "arm", "seconds", "tokens", "peak GiB"])
    for row in results["cost"]["stages"]:
        cost.add_row(
            row["stage"],
            ARM_NAMES.get(row["arm"], row["arm"]),
            number(row["wall_s"], 1),
            count(row["tokens"]),
            number(row["peak_gib"], 2),
        )
    tests = judge_sheet(results.get("judge_tests", []), confidence)
    temperatures = temperature_table(results)
    shown += [temperature_sheet(temperatures, confidence)] if temperatures is not None else []
    rounds = round_table(results)
    shown += [round_sheet(rounds, confidence)] if rounds is not None else []
    best = best_of_n_sheet(results.get("best_of_n", []), confidence)
    shown += [best] if best.rows else []
    return [
        policies,
        win_rate_sheet(final, confidence),
        *shown,
        *([tests] if tests.rows else []),
        held_out_sheet(results, confidence),
        *outputs_sheets(results.get("reward_outputs"), confidence),
        cost,
    ]


def with_names(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Win rates of a run with the names of its policies for readers."""
    return [{**row, **{side: policy_name(row[side]) for side in ("policy", "baseline")}} for row in rows]


def filter_sheet(summary: Mapping[str, Any]) -> Sheet:
    """The rates that a filter's threshold will have on new data, with their 95% intervals."""
    title = f"Threshold {summary['threshold']:g}, for a false-positive rate of {percent(summary['fpr']['target'])}"
    sheet = Sheet(title, ["on new data", "value", "95% interval", "responses", "groups"])
    for name, key in (("false positives", "fpr"), ("recall", "recall"), ("precision", "precision")):
        row = summary[key]
        bounds = interval(row["ci_low"], row["ci_high"])
        sheet.add_row(name, percent(row["value"]), bounds, str(row["n"]), str(row["n_groups"]))
    return sheet


def best_of_n_sheet(rows: Sequence[Mapping[str, Any]], confidence: float) -> Sheet:
    """Best of n samples of SFT by each reward, in gold reward; where gold is not known, in the reward that picks."""
    measured = {row["measured_by"] for row in rows}
    bounds = interval_heading(confidence)
    sheet = Sheet(
        "Best of n samples of SFT", ["picked by", "measured by", "n", "reward", bounds, "KL (nats)"], n_keys=3
    )
    for row in rows:
        if row["measured_by"] == ("gold" if "gold" in measured else row["picked_by"]):
            kl = f"{'' if row['kl_exact'] else 'at most '}{number(row['kl_nats'], 2)}"
            within = interval(row["ci_low"], row["ci_high"], number)
            sheet.add_row(row["picked_by"], row["measured_by"], str(row["n"]), number(row["value"]), within, kl)
    return sheet


def round_sheet(table: RoundTable, confidence: float) -> Sheet:
    """Both arms at the end of each round, and the labels that they had spent until then."""
    bounds = interval_heading(confidence)
    rate = ["wins over SFT", bounds]
    key, reward = table.reward
    columns = ["round", "arm", "labels so far", "failed", reward, "KL (nats)", *rate, "right on fresh samples", bounds]
    judge = f", judge {table.judge}" if table.judge else ""
    sheet = Sheet(f"Rounds, labels by {table.labelled_by}{judge}", columns, n_keys=2)
    for entry in table.rows:
        row = entry.row
        sheet.add_row(
            str(entry.round),
            entry.name,
            count(row["labels_so_far"]),
            count(row["labels"]["failed"]) if row["labels"] is not None else "-",
            number(row[key]["value"]),
            number(row["kl_nats"], 2),
            *estimate_cells(entry.rate, percent),
            *estimate_cells(row["fresh_accuracy"], percent),
        )
    return sheet


def temperature_sheet(table: TemperatureTable, confidence: float) -> Sheet:
    """The three comparisons at each sampling temperature. The verdict's temperature has a star."""
    bounds = interval_heading(confidence)
    against_dpo = ["RM + PPO against DPO", bounds]
    kl = ["KL RM + PPO", "KL DPO"]
    columns = ["temperature", "judge", *against_dpo, "RM + PPO against SFT", "DPO against SFT", *kl]
    sheet = Sheet("Win rates by sampling temperature (*: the verdict's)", columns, n_keys=2)
    for row in table.rows:
        rates = [None if rate is None else rate["win_rate"] for rate in (row.arms, row.ppo_over_sft, row.dpo_over_sft)]
        within = (None, None) if row.arms is None else (row.arms["ci_low"], row.arms["ci_high"])
        sheet.add_row(
            f"{row.temperature}{'*' if row.decides else ''}",
            row.judge or "-",
            percent(rates[0]),
            interval(*within),
            *map(percent, rates[1:]),
            *(number(row.kl[name]["kl_nats"], 2) for name in ("rm_ppo", "dpo")),
        )
    return sheet


def held_out_sheet(results: Mapping[str, Any], confidence: float) -> Sheet:
    """Both rewards on held-out comparisons, beside gold, what the labels allow, and a coin."""
    bounds = interval_heading(confidence)
    sheet = Sheet(
        "Held-out comparisons", ["reward", "accuracy", bounds, "against gold", bounds, "log loss", "Brier", "ECE"]
    )
    quality = results["rm_quality"]
    references = quality["explicit"].get("references") or {}
    rows = {
        "explicit (RM)": quality["explicit"],
        "implicit (DPO)": quality["implicit"],
        "gold": quality.get("gold"),
        "best on these labels": references.get("label_ceiling"),
        "a coin": references.get("coin"),
    }
    for label, row in rows.items():
        if row is not None:
            accuracies = [
                estimate_cells(estimate_of(row.get(f"accuracy{on}")), percent) for on in ("", "_against_gold")
            ]
            losses = [estimate_cells(estimate_of(row.get(name)), number)[0] for name in ("nll", "brier", "ece")]
            sheet.add_row(label, *accuracies[0], *accuracies[1], *losses)
    agreement = results["implicit_vs_explicit"]["held_out"]["agreement"]
    sheet.add_row("explicit and implicit agree", *estimate_cells(agreement, percent), *["-"] * 5)
    return sheet


def outputs_sheets(outputs: Mapping[str, Any] | None, confidence: float) -> list[Sheet]:
    """The members of an ensemble, or the heads of annotators, on held-out comparisons; nothing of one output."""
    if outputs is None:
        return []
    bounds = interval_heading(confidence)
    members = Sheet("Outputs of the reward model", ["output", "accuracy", bounds])
    for row in outputs["outputs"]:
        members.add_row(row["output"], *estimate_cells(row["accuracy"], percent))
    members.add_row(f"score ({outputs['combine']})", *estimate_cells(outputs["accuracy"], percent))
    members.add_row("disagreement (sd)", *estimate_cells(outputs["disagreement"], number))
    by_annotator = outputs["annotators"]
    if by_annotator is None:
        return [members]
    sheet = Sheet("By annotator", ["against", "its head", bounds, "the score", bounds, "others agree", "pairs"])
    for row in by_annotator["annotators"]:
        head, score = (estimate_cells(row[f"accuracy_of_{name}"], percent) for name in ("head", "score"))
        agree = estimate_cells(row["agreement_with_others"], percent)[0]
        sheet.add_row(row["annotator"], *head, *score, agree, count(row["n"]))
    majority = by_annotator["majority"]
    agree = estimate_cells(by_annotator["agreement"], percent)[0]
    score = estimate_cells(majority["accuracy_of_score"], percent)
    sheet.add_row("the majority", "-", "-", *score, agree, count(majority["n"]))
    return [members, sheet]


def estimate_of(value: Any) -> Mapping[str, Any] | None:
    """An estimate unchanged, or a bare number as an estimate without an interval."""
    if value is None or isinstance(value, Mapping):
        return value
    return {"value": float(value), "ci_low": None, "ci_high": None}


def judge_sheet(tests: Sequence[Mapping[str, Any]], confidence: float) -> Sheet:
    """The judges' tests on held-out comparisons. Judges that score each response alone have no order."""
    bounds = interval_heading(confidence)
    columns = ["judge", "accuracy", bounds, "best possible", "same in both orders", bounds, "pairs", "test"]
    sheet = Sheet("Judges on held-out labels (a coin: 50%)", columns)
    results = {True: "passed", False: "not passed", None: "not tested"}
    for test in tests:
        sheet.add_row(
            test["judge"],
            *estimate_cells(test["accuracy"], percent),
            percent(test["label_ceiling"]["value"]),
            *estimate_cells(test["position_consistency"], percent),
            count(test["n_pairs"]) + (f", {count(test['n_failed'])} failed" if test["n_failed"] else ""),
            results[test["passed"]],
        )
    return sheet


def rewards_sheets(summary: Mapping[str, Any], title: str = "Implicit rewards") -> list[Sheet]:
    """The summary of rewards: what was scored, and the check against explicit rewards where there is one."""
    scored = Sheet(title, ["", "value", "95% interval"])
    for name in ("n_prompts", "n_responses", "beta", "seconds", "responses_per_second"):
        if name in summary:
            scored.add_row(name.replace("_", " "), f"{summary[name]:,.4g}", "")
    if summary["accuracy"] is not None:
        scored.add_row("pairwise accuracy", percent(summary["accuracy"]), interval(*summary["accuracy_ci"]))
    against = Sheet("Implicit against explicit, within prompts", ["", "value", "95% interval"])
    for name, estimate in summary.get("implicit_vs_explicit", {}).items():
        if isinstance(estimate, Mapping) and estimate.get("value") is not None and "ci_low" in estimate:
            against.add_row(name.replace("_", " "), *estimate_cells(estimate, number))
    return [scored, *([against] if against.rows else [])]
