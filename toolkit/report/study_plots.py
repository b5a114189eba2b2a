"""The figures of a study's page: frontiers, curves at equal KL and equal compute, and the expected best of n trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from toolkit.evals.study.matching import Axis, amount
from toolkit.report.figures import Figure, Layout, Trace, axis, level, rounded
from toolkit.report.names import ARM_NAMES, arm_name, color
from toolkit.report.numbers import interval, number, percent

Row = Mapping[str, Any]
ARMS = ("rm_ppo", "dpo")
AXIS_TITLES: dict[Axis, str] = {
    "kl_nats": "KL to the start, nats per response",
    "train_tokens": "training tokens",
    "wall_s": "seconds",
}
_CONTROL_MARKS = ("diamond", "square", "triangle-up", "diamond-open", "square-open")


# ---------------------------------------------------------------- score against KL


def frontiers(document: Row) -> list[Figure]:
    """Score against KL for each judge: on test prompts, and on dev prompts where some policies have no test rows."""
    points = [point for trial in document["trials"] for point in trial["checkpoints"]]
    untested = sum(_tested(point) is False for point in points)
    figures = []
    for place, judge in enumerate(document["chosen"]["dpo"]["test_score"]):
        by = "" if judge == "score" else f", judge {judge}"
        note = f"{untested} of {len(points)} policies have no test rows; they are in the figure on dev prompts."
        title = f"Score against KL on test prompts{by}"
        figures.append(_frontier(document, judge, "test", f"frontier-test-{place}", title, note if untested else ""))
        if untested:
            note = "The choice was made on these prompts: what was chosen looks a little too good here."
            title = f"Every policy on dev prompts{by}"
            figures.append(_frontier(document, judge, "dev", f"frontier-dev-{place}", title, note))
    return [figure for figure in figures if figure is not None]


def _tested(point: Row) -> bool:
    return any(value is not None for value in point["test_score"].values())


def _frontier(document: Row, judge: str, split: str, name: str, title: str, note: str) -> Figure | None:
    traces: list[Trace] = []
    words = []
    for arm in ARMS:
        trials = [trial for trial in document["trials"] if trial["arm"] == arm]
        points = [
            {**point, "setting": trial["setting"], "y": point[f"{split}_score"][judge]}
            for trial in trials
            for point in trial["checkpoints"]
            if point["kl_nats"] is not None and point[f"{split}_score"][judge] is not None
        ]
        if split == "test":
            traces += _seed_lines(arm, trials, judge)
        traces += _policies(arm, points)
        traces += _front(arm, points, judge)
        chosen = document["chosen"][arm]
        if chosen["kl_nats"] is not None:
            traces.append(_mark(chosen, arm, chosen[f"{split}_score"][judge], f"{ARM_NAMES[arm]}, chosen"))
            at = number(chosen[f"{split}_score"][judge])
            words.append(f"{ARM_NAMES[arm]} as chosen: {at} at {amount('kl_nats', chosen['kl_nats'])}")
    if not traces:
        return None
    marks = cycle(_CONTROL_MARKS)
    for control in document["controls"]:
        chosen, label, mark = control["chosen"], arm_name(control["arm"]), next(marks)
        if chosen["kl_nats"] is not None:
            trace = _mark(chosen, "", chosen[f"{split}_score"][judge], label)
            # SFT looks as it does in the report of a run
            trace["marker"] |= {"symbol": "circle-open" if control["arm"] == "sft" else mark, "size": 10}
            traces.append(trace)
            words.append(f"{label}: {number(chosen[f'{split}_score'][judge])}")
    alt = f"{title}: mean scores of both arms' policies against KL. {'; '.join(words)}."
    layout = {"xaxis": axis(AXIS_TITLES["kl_nats"]), "yaxis": axis("mean score"), "hovermode": "closest"}
    return Figure(name, title, alt, traces, layout, note)


def _seed_lines(arm: str, trials: Sequence[Row], judge: str) -> list[Trace]:
    """A thin line for each seed of each trial, as one trace with gaps."""
    x: list[float | None] = []
    y: list[float | None] = []
    for trial in trials:
        rows = [{row["seed"]: row for row in point["seeds"]} for point in trial["checkpoints"] if _tested(point)]
        for seed in rows[0] if len(rows) > 1 else ():
            x += [*(of_seed[seed]["kl_nats"] for of_seed in rows), None]
            y += [*(of_seed[seed]["score"][judge] for of_seed in rows), None]
    if not x:
        return []
    line = {"color": f"{color(arm)}/0.35", "width": 0.8}
    trace = {"type": "scatter", "mode": "lines", "name": f"{ARM_NAMES[arm]}, each seed", "hoverinfo": "skip"}
    return [{**trace, "x": _gapped(x), "y": _gapped(y), "line": line}]


def _gapped(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else rounded([value])[0] for value in values]


def _policies(arm: str, points: Sequence[Row]) -> Iterator[Trace]:
    """A mark for each setting and checkpoint; a cross where a seed diverged."""
    for diverged in (False, True):
        shown = [point for point in points if diverged is _diverged(point)]
        if shown:
            mark = {"color": f"{color(arm)}/0.8", "size": 6}
            if diverged:
                mark |= {"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": color(arm)}}
            yield {
                "type": "scatter",
                "mode": "markers",
                "name": f"{ARM_NAMES[arm]}, a seed diverged" if diverged else ARM_NAMES[arm],
                "x": rounded(point["kl_nats"] for point in shown),
                "y": rounded(point["y"] for point in shown),
                "text": [_hover(ARM_NAMES[arm], point, point["y"]) for point in shown],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": mark,
            }


def _diverged(point: Row) -> bool:
    return any(row["diverged"] for row in point["seeds"])


def _front(arm: str, points: Sequence[Row], judge: str) -> list[Trace]:
    """A line through the policies that no other one beats on dev prompts at the same KL or less."""
    best, front = None, []
    for point in sorted(points, key=lambda point: (point["kl_nats"], -(point["dev_score"][judge] or 0.0))):
        score = point["dev_score"][judge]
        if score is not None and not _diverged(point) and (best is None or score > best):
            best = score
            front.append(point)
    if len(front) < 2:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"{ARM_NAMES[arm]}, Pareto front",
            "x": rounded(point["kl_nats"] for point in front),
            "y": rounded(point["y"] for point in front),
            "hoverinfo": "skip",
            "line": {"color": color(arm), "width": 2},
        }
    ]


def _mark(chosen: Row, arm: str, score: float, label: str) -> Trace:
    """The large mark of one chosen policy."""
    shade = color(arm) if arm else "@best_of_n"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "x": [chosen["kl_nats"]],
        "y": [score],
        "text": [_hover(label, chosen, score)],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": shade, "size": 15, "symbol": "circle-open", "line": {"width": 2.5, "color": shade}},
    }


def _hover(name: str, point: Row, score: float) -> str:
    place = f"{amount('kl_nats', point['kl_nats'])}, {amount('train_tokens', point['train_tokens'])} tokens"
    # Plotly reads a few tags in the text of a hover label, and a setting's name comes from a table.
    setting = str(point["setting"]).replace("&", "&amp;").replace("<", "&lt;")
    return f"<b>{name}</b><br>{setting}, checkpoint {point['checkpoint']}<br>score {number(score)}<br>{place}"


# ---------------------------------------------------------------- curves with bands


def win_rate_curve(name: str, title: str, key: str, label: str, rows: Sequence[Row]) -> Figure | None:
    """The win rate of RM + PPO along an axis, with its pointwise intervals. None with fewer than two points."""
    known = [row for row in rows if row["win_rate"] is not None]
    if len(known) < 2:
        return None
    traces = _curve("RM + PPO wins", known, key, "win_rate", "@ink", percent)
    first, last = known[0], known[-1]
    alt = f"{title}: {percent(first['win_rate'])} at {first[key]:.4g}, {percent(last['win_rate'])} at {last[key]:.4g}."
    layout: Layout = {"xaxis": axis(label), "yaxis": axis("RM + PPO wins", tickformat=".0%"), "shapes": [level(0.5)]}
    return Figure(name, title, alt, traces, layout | {"hovermode": "closest"})


def score_curves(
    name: str, title: str, key: str, label: str, of_arms: Mapping[str, Sequence[Row]], note: str = ""
) -> Figure | None:
    """The mean score of each arm along an axis, with its pointwise intervals. None with fewer than two points."""
    traces, words = [], []
    for arm, rows in of_arms.items():
        if len(rows) > 1:
            traces += _curve(ARM_NAMES[arm], rows, key, "score", color(arm), number)
            words.append(f"{ARM_NAMES[arm]} {number(rows[0]['score'])} to {number(rows[-1]['score'])}")
    if not traces:
        return None
    layout = {"xaxis": axis(label), "yaxis": axis("mean score"), "hovermode": "closest"}
    return Figure(name, title, f"{title}: {'; '.join(words)}.", traces, layout, note)


def _curve(name: str, rows: Sequence[Row], key: str, value: str, shade: str, form: Any) -> list[Trace]:
    """A line, and its band where there are intervals."""
    x = rounded(row[key] for row in rows)
    banded = [row for row in rows if row["ci_low"] is not None]
    traces: list[Trace] = []
    if banded:
        along = rounded(row[key] for row in banded)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{name}, interval",
                "x": along + along[::-1],
                "y": rounded([row["ci_high"] for row in banded] + [row["ci_low"] for row in banded[::-1]]),
                "fill": "toself",
                "fillcolor": f"{shade}/0.14",
                "line": {"color": shade, "width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    hover = []
    for row in rows:
        bounds = interval(row["ci_low"], row["ci_high"], form)
        hover.append(f"<b>{name} {form(row[value])}</b><br>{'no interval' if bounds == '-' else bounds}")
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(rows) <= 12 else "lines",
        "name": name,
        "x": x,
        "y": rounded(row[value] for row in rows),
        "text": hover,
        "hovertemplate": "%{text}<br>at %{x:.4g}<extra></extra>",
        "line": {"color": shade, "width": 2},
        "marker": {"color": shade, "size": 5},
    }
    return [*traces, line]


def matched(document: Row, part: str, key: Axis) -> list[Figure]:
    """Win rate and scores along KL or training tokens, over the range that both arms cover."""
    rows = document["verdict"][part]["curve"]
    along = {"kl_nats": "KL", "train_tokens": "training tokens", "wall_s": "wall time"}[key]
    of_arms = {arm: [{**row["scores"][arm], key: row[key]} for row in rows if arm in row["scores"]] for arm in ARMS}
    figures = [
        win_rate_curve(f"{part}-wins", f"RM + PPO against DPO at equal {along}", key, AXIS_TITLES[key], rows),
        score_curves(f"{part}-scores", f"Scores at equal {along}", key, AXIS_TITLES[key], of_arms),
    ]
    return [figure for figure in figures if figure is not None]


def effort(document: Row) -> list[Figure]:
    """What each arm reaches as its best of n trials, and the win rate at equal n."""
    rows, key, label = document["effort"], "n_trials", "trials of each arm"
    of_arms = {arm: [{**row[arm], key: row[key]} for row in rows if row[arm] is not None] for arm in ARMS}
    figures = [
        score_curves("effort-scores", "Expected best of n trials", key, label, of_arms),
        win_rate_curve("effort-wins", "RM + PPO against DPO with n trials each", key, label, rows),
    ]
    drawn = [figure for figure in figures if figure is not None]
    for figure in drawn:
        figure.layout["xaxis"] |= {"dtick": max(1, len(rows) // 8), "tick0": 1}
    return drawn
