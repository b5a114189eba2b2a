"""The report's figures and table of several rounds of sampling, labelling and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from toolkit.evals.verdict import ARMS
from toolkit.report.figures import Figure, Trace, axis, interval_bars, level, of_judge
from toolkit.report.names import ARM_NAMES, REWARDS, color
from toolkit.report.numbers import number, percent
from toolkit.report.reading import ResultRow, Run

Estimate = Mapping[str, Any]
"""``{value, ci_low, ci_high}``."""


@dataclass(frozen=True)
class RoundRow:
    """An arm at the end of a round. ``rate`` is its win rate over SFT by the table's judge."""

    round: int
    arm: str
    name: str
    row: ResultRow
    kl: Estimate
    rate: Estimate | None


@dataclass(frozen=True)
class RoundTable:
    """``judge`` gave the win rates, ``labelled_by`` the labels; ``reward`` is the shown one, by its key and name."""

    rows: list[RoundRow]
    judge: str
    labelled_by: str
    reward: tuple[str, str]


def round_table(results: Mapping[str, Any]) -> RoundTable | None:
    """Both arms at the end of each round. None where a run has one round alone."""
    rounds: Sequence[ResultRow] = results.get("rounds", [])
    if not rounds:
        return None
    judge = _judge(results.get("verdict", {}), list(rounds[-1]["rm_ppo"]["win_rate_over_sft"]))
    reward = "gold_reward" if rounds[-1]["rm_ppo"]["gold_reward"]["value"] is not None else "explicit_reward"
    rows = [
        RoundRow(entry["round"], arm, ARM_NAMES[arm], entry[arm], _kl(entry[arm]), _rate(entry[arm], judge))
        for entry in rounds
        for arm in ARMS
    ]
    return RoundTable(rows, judge, rounds[-1]["judge"], (reward, REWARDS[reward]))


def _judge(verdict: Mapping[str, Any], judges: Sequence[str]) -> str:
    """The judge of the verdict, or the first of those that are averaged for it; a training signal where none decides.

    >>> _judge({"judge": "all judges", "judges": {"gold": 0.5, "llm:m": 0.6}}, ["rm", "gold", "llm:m"])
    'gold'
    """
    deciding = [str(verdict.get("judge")), *verdict.get("judges", {}), *judges]
    return next((judge for judge in deciding if judge in judges), "")


def _kl(row: ResultRow) -> Estimate:
    return {"value": row["kl_nats"], "ci_low": row["kl_ci_low"], "ci_high": row["kl_ci_high"]}


def _rate(row: ResultRow, judge: str) -> Estimate | None:
    rate = row["win_rate_over_sft"].get(judge)
    return rate and {"value": rate["win_rate"], "ci_low": rate["ci_low"], "ci_high": rate["ci_high"]}


def round_figures(run: Run) -> list[Figure]:
    """Rewards, win rate over SFT, KL, and accuracy on fresh samples of both arms, by round."""
    rounds: Sequence[ResultRow] = run.results.get("rounds", [])
    if not rounds:
        return []
    drawn = [
        _figure(rounds, f"rounds-{key}", f"{REWARDS[key].capitalize()} by round", REWARDS[key], itemgetter(key), number)
        for key in ("gold_reward", "explicit_reward")
    ]
    for judge in rounds[-1]["rm_ppo"]["win_rate_over_sft"]:
        title, rate = f"Win rate over SFT by round, judge {judge}", partial(_rate, judge=judge)
        drawn.append(_figure(rounds, of_judge("rounds-win", judge), title, "win rate over SFT", rate, percent))
    drawn.append(_figure(rounds, "rounds-kl", "KL to SFT by round", "KL to SFT, nats per response", _kl, number))
    title = "Accuracy of each arm's reward on its own fresh samples"
    drawn.append(_figure(rounds, "rounds-fresh", title, "accuracy", itemgetter("fresh_accuracy"), percent))
    return [figure for figure in drawn if figure is not None]


def _figure(
    rounds: Sequence[ResultRow],
    name: str,
    title: str,
    label: str,
    estimate: Callable[[ResultRow], Estimate | None],
    form: Callable[[float], str],
) -> Figure | None:
    """A line for each arm. None where the quantity is not known."""
    traces: list[Trace] = []
    words = []
    for arm in ARMS:
        known = [(entry["round"], entry[arm], estimate(entry[arm])) for entry in rounds]
        points = [(round_, row, e) for round_, row, e in known if e is not None and e["value"] is not None]
        if not points:
            return None
        shade = color(arm)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": ARM_NAMES[arm],
                "x": [round_ for round_, _, _ in points],
                "y": [e["value"] for _, _, e in points],
                "error_y": interval_bars([(e["value"], e) for _, _, e in points], shade),
                "text": [
                    f"<b>{ARM_NAMES[arm]}, round {round_}</b><br>{form(e['value'])}<br>{row['labels_so_far']:,} labels"
                    for round_, row, e in points
                ],
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"color": shade, "width": 2},
                "marker": {"color": shade, "size": 8},
            }
        )
        words.append(f"{ARM_NAMES[arm]}: " + ", ".join(form(e["value"]) for _, _, e in points))
    share = form is percent
    layout = {
        "xaxis": axis("round", dtick=1),
        "yaxis": axis(label, **({"tickformat": ".0%"} if share else {})),
        "hovermode": "closest",
    } | ({"shapes": [level(0.5)]} if share else {})
    return Figure(name, title, f"{title}. {'; '.join(words)}.", traces, layout)
