"""The report's figures of an evaluation: rewards against KL, margins, calibration and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from toolkit.evals.summary import TableRow, grouped
from toolkit.preferences.samples import by_policy
from toolkit.report.figures import Figure, Layout, Trace, axis, interval_bars, level, of_judge, rounded
from toolkit.report.names import ARM_NAMES, REWARD_COLOR, REWARDS, color, policy_name
from toolkit.report.numbers import interval, number, percent
from toolkit.report.reading import ResultRow, Run

MAX_POINTS = 2000
Form = Callable[[float], str]

# ---------------------------------------------------------------- rewards and win rates against KL


@dataclass(frozen=True)
class FrontierPoint:
    """A policy in a figure against KL. ``kl`` has the interval of ``kl_nats``, ``estimate`` that of ``y``."""

    policy: str
    arm: str
    kind: str  # sft, checkpoint, final or best_of_n; "start" is SFT as the first point of an arm's line
    step: int
    kl_nats: float
    kl: Mapping[str, Any]
    y: float
    estimate: Mapping[str, Any]


# The start of a line has no mark: SFT has a trace of its own.
_SIZE = {"final": 11, "start": 0, "best_of_n": 9}


def frontier(run: Run) -> list[Figure]:
    """Each reward, and each judge's win rate over SFT, against KL: both arms with their checkpoints, and best-of-n."""
    ends = ("ci_low", "ci_high")
    of_kl = {row["policy"]: {end: row.get(f"kl_{end}") for end in ends} for row in run.results["policies"]}
    rows = [row | {"kl": of_kl.get(row["policy"], dict.fromkeys(ends))} for row in run.results.get("frontier", [])]
    if not any(row["arm"] in ("rm_ppo", "dpo") for row in rows):
        return []
    judges = dict.fromkeys(judge for row in rows for judge in row["win_rate_over_sft"])
    figures = [_reward_frontier(rows, reward) for reward in REWARDS]
    figures += [_win_rate_frontier(rows, judge) for judge in judges]
    return [figure for figure in figures if figure is not None]


def _reward_frontier(rows: Sequence[ResultRow], reward: str) -> Figure | None:
    points = [_point(row, row[reward]["value"], row[reward]) for row in rows if row[reward]["value"] is not None]
    if not points:
        return None
    label = REWARDS[reward]
    alt = f"Mean {label} of every policy against its KL divergence from SFT. {_in_words(points, number)}"
    title = f"{label.capitalize()} against KL"
    return Figure(f"frontier-{reward}", title, alt, _curves(points, number), _against_kl(label))


def _win_rate_frontier(rows: Sequence[ResultRow], judge: str) -> Figure | None:
    points = [
        _point(row, rate["win_rate"], rate)
        for row in rows
        if (rate := row["win_rate_over_sft"].get(judge)) and rate["win_rate"] is not None
    ]
    if not points:
        return None
    alt = f"Win rate over SFT, judge {judge}, against KL from SFT. {_in_words(points, percent)}"
    half = {"ci_low": 0.5, "ci_high": 0.5}
    start = [_point(row, 0.5, half) for row in rows if row["kind"] == "sft"]
    layout = _against_kl("win rate over SFT")
    layout["yaxis"] |= {"tickformat": ".0%"}
    layout["shapes"] = [level(0.5)]
    title = f"Win rate over SFT against KL, judge {judge}"
    return Figure(of_judge("frontier-win", judge), title, alt, _curves(start + points, percent), layout)


def _point(row: ResultRow, y: float, estimate: Mapping[str, Any]) -> FrontierPoint:
    kl = (row["kl_nats"], row["kl"])
    return FrontierPoint(row["policy"], row["arm"], row["kind"], row["step"], *kl, y, estimate)


def _against_kl(label: str) -> Layout:
    return {"xaxis": axis("KL to SFT, nats per response", zeroline=True), "yaxis": axis(label), "hovermode": "closest"}


def _curves(points: Sequence[FrontierPoint], form: Form) -> list[Trace]:
    """A line for each arm, which begins at SFT, and a point for each best-of-n policy and for SFT."""
    sft = [point for point in points if point.kind == "sft"]
    traces = []
    for arm in ("rm_ppo", "dpo"):
        trained = sorted((point for point in points if point.arm == arm), key=lambda point: point.step)
        if trained:
            line = [replace(point, kind="start") for point in sft] + trained
            traces.append(_trace(line, ARM_NAMES[arm], color(arm), form, mode="lines+markers"))
    baseline = [point for point in points if point.arm == "rft"]
    if baseline:
        traces.append(_trace(baseline, ARM_NAMES["rft"], "@rft", form, mode="markers"))
        traces[-1]["marker"]["symbol"] = "square"
    for point in points:
        if point.kind == "best_of_n":
            trace = _trace([point], policy_name(point.policy), "@best_of_n", form, mode="markers")
            trace["marker"]["symbol"] = "diamond" if point.policy.endswith("_rm") else "diamond-open"
            traces.append(trace)
    if sft:
        trace = _trace(sft, "SFT", "@sft", form, mode="markers")
        trace["marker"] |= {"symbol": "circle-open", "size": 10, "line": {"width": 2, "color": "@sft"}}
        traces.append(trace)
    return traces


def _trace(points: Sequence[FrontierPoint], name: str, shade: str, form: Form, *, mode: str) -> Trace:
    sizes = [_SIZE.get(point.kind, 7) for point in points]
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [point.kl_nats for point in points],
        "y": [point.y for point in points],
        "error_x": interval_bars([(point.kl_nats, point.kl) for point in points], shade),
        "error_y": interval_bars([(point.y, point.estimate) for point in points], shade),
        "text": [_hover(point, form) for point in points],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": shade, "width": 2},
        "marker": {"color": shade, "size": sizes, "opacity": 1, "line": {"width": 0}},
    }


def _hover(point: FrontierPoint, form: Form) -> str:
    of_kl = _bounds(point.kl, lambda value: number(value, 2)) if point.kind not in ("sft", "start") else ""
    kl = f"KL{' at most' if point.kind == 'best_of_n' else ''} {number(point.kl_nats, 2)}{of_kl} nats"
    name = "SFT (start)" if point.kind == "start" else policy_name(point.policy)
    step = f", step {point.step}" if point.kind == "final" and point.step else ""
    return f"<b>{name}{step}</b><br>{form(point.y)}{_bounds(point.estimate, form)}<br>{kl}"


def _bounds(estimate: Mapping[str, Any], form: Form) -> str:
    low, high = estimate.get("ci_low"), estimate.get("ci_high")
    return f" ({interval(low, high, form)})" if low is not None and high is not None else ""


def _in_words(points: Sequence[FrontierPoint], form: Form) -> str:
    return "; ".join(f"{policy_name(p.policy)}: {form(p.y)} at {number(p.kl_nats, 2)} nats" for p in points) + "."


def overoptimization(run: Run) -> list[Figure]:
    """Rewards above those of SFT against sqrt(KL), one figure for each arm, with the curve of Gao et al. if it fits."""
    figures = []
    for arm in ("rm_ppo", "dpo"):
        by_arm = run.results.get("overoptimization", {}).get(arm, {})
        rows = sorted(by_arm.get("rows", []), key=lambda row: row["step"])
        traces = []
        for reward, label in REWARDS.items():
            points = [row for row in rows if row[reward] is not None]
            if points:
                fit = (by_arm.get("fits", {}).get(reward) or {}).get("rl")
                traces += _overoptimization_traces(points, reward, label, fit)
        alt = f"Rewards of {ARM_NAMES[arm]} above those of SFT, by checkpoint, against the square root of KL."
        layout = {"xaxis": axis("√KL to SFT, √nats"), "yaxis": axis("reward above SFT's"), "shapes": [level(0.0)]}
        if traces:
            figures.append(Figure(f"over-{arm}", ARM_NAMES[arm], alt, traces, layout))
    return figures


def best_of_n(run: Run) -> list[Figure]:
    """The best of n samples of SFT against its KL: a figure for each reward that measures it, a line for each that
    picks."""
    rows = run.results.get("best_of_n", [])
    figures = []
    for reward, label in REWARDS.items():
        measured = [row for row in rows if f"{row['measured_by']}_reward" == reward and row["value"] is not None]
        picks = dict.fromkeys(row["picked_by"] for row in measured)
        traces = [_best_of_n_trace([row for row in measured if row["picked_by"] == name], name) for name in picks]
        if traces:
            best = [
                max((row for row in measured if row["picked_by"] == name), key=lambda row: row["n"]) for name in picks
            ]
            words = "; ".join(f"by the {r['picked_by']} reward {number(r['value'])} at n = {r['n']}" for r in best)
            alt = f"Mean {label} of the best of n samples of SFT, picked by each reward, against its KL. {words}."
            layout = _against_kl(label)
            figures.append(Figure(f"best-of-n-{reward}", f"{label.capitalize()} of the best of n", alt, traces, layout))
    return figures


def _best_of_n_trace(rows: Sequence[ResultRow], picked_by: str) -> Trace:
    """The line of a reward that picks. Its points carry n; they are open where their KL is a bound."""
    rows = sorted(rows, key=lambda row: row["n"])
    shade = REWARD_COLOR[f"{picked_by}_reward"]
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": f"picked by the {picked_by} reward",
        "x": rounded(row["kl_nats"] for row in rows),
        "y": rounded(row["value"] for row in rows),
        "error_y": interval_bars([(row["value"], row) for row in rows], shade),
        "text": [str(row["n"]) for row in rows],
        "textposition": "top left",
        "hovertext": [_best_of_n_hover(row) for row in rows],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "line": {"color": shade, "width": 2},
        "marker": {"color": shade, "size": 7, "symbol": "circle" if rows[0]["kl_exact"] else "circle-open"},
        "textfont": {"color": shade, "size": 11},
    }


def _best_of_n_hover(row: ResultRow) -> str:
    bounds = "" if row["ci_low"] is None else f" ({interval(row['ci_low'], row['ci_high'], number)})"
    kl = f"KL{'' if row['kl_exact'] else ' at most'} {number(row['kl_nats'], 2)} nats"
    return f"<b>best of {row['n']} by the {row['picked_by']} reward</b><br>{number(row['value'])}{bounds}<br>{kl}"


def _overoptimization_traces(
    rows: Sequence[ResultRow], reward: str, label: str, fit: Mapping[str, Any] | None
) -> list[Trace]:
    """One reward at every checkpoint of an arm, and the fitted curve."""
    shade = REWARD_COLOR[reward]
    hover = [
        f"<b>{policy_name(row['policy'])}</b><br>{label} {number(row[reward], sign=True)}"
        f"<br>KL {number(row['kl_nats'], 2)} nats"
        for row in rows
    ]
    measured = {
        "type": "scatter",
        "mode": "markers" if fit else "lines+markers",
        "name": label,
        "x": [0.0, *(row["sqrt_kl"] for row in rows)],
        "y": [0.0, *(row[reward] for row in rows)],
        "text": ["<b>SFT</b>", *hover],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": shade, "width": 2},
        "marker": {"color": shade, "size": 7},
    }
    if not fit:
        return [measured]
    reach = max(row["sqrt_kl"] for row in rows)
    d = np.linspace(reach / 60, reach * 1.1, 60)
    fitted = {
        "type": "scatter",
        "mode": "lines",
        "name": label,
        "x": rounded(d),
        "y": rounded(d * (fit["a"] - fit["b"] * np.log(d))),
        "line": {"color": shade, "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [measured, fitted]


# ---------------------------------------------------------------- held-out comparisons


@dataclass(frozen=True)
class MarginPair:
    """Two responses to a prompt: differences of their rewards, turned so that ``explicit`` is not negative."""

    explicit: float
    implicit: float
    gold: float | None


def margins(run: Run) -> list[Figure]:
    """Implicit against explicit margin of every pair of held-out responses to the same prompt."""
    pairs = [
        _margin_pair(a, b) for rows in grouped(run.rewards, "prompt_id").values() for a, b in combinations(rows, 2)
    ]
    if not pairs:
        return []
    every = math.ceil(len(pairs) / MAX_POINTS)
    drawn = pairs[::every]
    dots, crosses = ("@ink/0.55", "circle"), ("@warn/0.75", "x-thin")
    rings = ("@muted/0.8", "circle-open") if run.has_gold else dots
    groups = {
        "gold agrees with the explicit order": ([p for p in drawn if p.gold is not None and p.gold > 0], dots),
        "gold contradicts it": ([p for p in drawn if p.gold is not None and p.gold < 0], crosses),
        "gold ties" if run.has_gold else "pairs": ([p for p in drawn if p.gold is None or p.gold == 0], rings),
    }
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": rounded(p.explicit for p in points),
            "y": rounded(p.implicit for p in points),
            "marker": {"color": shade, "size": 5, "symbol": symbol}
            | ({} if symbol == "circle" else {"line": {"color": shade, "width": 1.4}}),
            "hovertemplate": "explicit %{x:+.3f}<br>implicit %{y:+.3f}<extra></extra>",
        }
        for name, (points, (shade, symbol)) in groups.items()
        if points
    ]
    note = "Each pair is turned so that its explicit margin is positive. Above the line both rewards agree."
    if len(drawn) < len(pairs):
        note += f" One pair in {every} of {len(pairs):,} is drawn."
    agree = sum(p.explicit * p.implicit > 0 for p in pairs) / len(pairs)
    alt = (
        f"Implicit against explicit reward margin of {len(pairs)} pairs within prompts; {agree:.0%} have the same sign."
    )
    layout = {"xaxis": axis("explicit margin"), "yaxis": axis("implicit margin"), "shapes": [level(0.0)]}
    title = "Margins of the same pairs under both rewards"
    return [Figure("margins", title, alt, traces, layout | {"hovermode": "closest"}, note)]


def _margin_pair(a: TableRow, b: TableRow) -> MarginPair:
    if a["explicit_reward"] < b["explicit_reward"]:
        a, b = b, a
    known = a["gold_reward"] is not None and b["gold_reward"] is not None
    return MarginPair(
        explicit=a["explicit_reward"] - b["explicit_reward"],
        implicit=a["implicit_reward"] - b["implicit_reward"],
        gold=a["gold_reward"] - b["gold_reward"] if known else None,
    )


def reliability(run: Run) -> list[Figure]:
    """Accuracy of both rewards on held-out comparisons, against their confidence and against the size of the margin."""
    qualities = [
        (f"{kind} reward", quality, color(arm))
        for kind, arm in (("explicit", "rm_ppo"), ("implicit", "dpo"))
        if (quality := run.results.get("rm_quality", {}).get(kind))
    ]
    if not qualities:
        return []
    in_percent = {"tickformat": ".0%"}
    by_confidence = Figure(
        "reliability",
        "Reliability",
        "Share of held-out comparisons ordered right, against the confidence that the reward margin implies.",
        [_reliability_trace(*quality) for quality in qualities],
        {
            "xaxis": axis("confidence, sigmoid of the margin", **in_percent, range=[0.48, 1.02]),
            "yaxis": axis("accuracy", **in_percent),
            "shapes": [_calibrated_line()],
            "hovermode": "closest",
        },
        "On the dotted line a reward is right as often as it claims. A larger point stands for more comparisons.",
    )
    by_margin = Figure(
        "by-margin",
        "Accuracy by size of the margin",
        "Accuracy on held-out comparisons in fifths of the reward margin's size.",
        [_margin_trace(*quality) for quality in qualities],
        {
            "xaxis": axis("mean |margin| of the fifth"),
            "yaxis": axis("accuracy", **in_percent),
            "shapes": [level(0.5)],
            "hovermode": "closest",
        },
        "Fifths of the comparisons by the size of their margin. A useful reward is more often right on large ones.",
    )
    return [by_confidence, by_margin]


def _calibrated_line() -> Layout:
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": 0.5, "x1": 1.0, "y0": 0.5, "y1": 1.0, "line": line, "layer": "below"}


def _reliability_trace(name: str, quality: Mapping[str, Any], shade: str) -> Trace:
    bins = [b for b in quality["reliability"] if b["n"]]
    # The area of a point says how many comparisons it stands for.
    sizes = [5 + 17 * math.sqrt(b["share"]) for b in bins]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": rounded(b["confidence"] for b in bins),
        "y": rounded(b["accuracy"] for b in bins),
        "line": {"color": shade, "width": 1.5},
        "marker": {"color": shade, "size": sizes, "opacity": 0.85, "line": {"width": 0}},
        "text": [f"{b['n']} comparisons, {b['share']:.0%}" for b in bins],
        "hovertemplate": "confidence %{x:.1%}<br>accuracy %{y:.1%}<br>%{text}<extra></extra>",
    }


def _margin_trace(name: str, quality: Mapping[str, Any], shade: str) -> Trace:
    fifths = quality["accuracy_by_margin"]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": rounded(f["margin"] for f in fifths),
        "y": rounded(f["value"] for f in fifths),
        "error_y": interval_bars([(f["value"], f) for f in fifths], shade),
        "line": {"color": shade, "width": 1.5},
        "marker": {"color": shade, "size": 7},
        "hovertemplate": "margin %{x:.3f}<br>accuracy %{y:.1%}<extra></extra>",
    }


# ---------------------------------------------------------------- lengths


def lengths(run: Run) -> list[Figure]:
    """Response lengths of the final policies, and how many responses end by themselves along training."""
    tokens_of = {
        name: [sample.n_tokens for sample in samples]
        for name, samples in by_policy(run.samples).items()
        if samples[0].kind not in ("checkpoint", "round")
    }
    if not tokens_of:
        return []
    traces = []
    for name, values in tokens_of.items():
        sizes, counts = np.unique(values, return_counts=True)
        minor = name not in ("sft", "rm_ppo", "dpo")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": policy_name(name),
                "x": [0, *(int(size) for size in sizes)],
                "y": rounded([0.0, *np.cumsum(counts) / len(values)]),
                "line": {"color": color(name), "width": 2, "shape": "hv", "dash": "dot" if minor else "solid"},
                "visible": "legendonly" if minor else True,
                "hovertemplate": "up to %{x} tokens: %{y:.1%}<extra>" + policy_name(name) + "</extra>",
            }
        )
    means = "; ".join(f"{policy_name(name)}: mean {np.mean(values):.1f}" for name, values in tokens_of.items())
    distribution = Figure(
        "lengths",
        "Share of responses up to a length",
        f"Cumulative distribution of response lengths in tokens. {means}.",
        traces,
        {
            "xaxis": axis("tokens", range=[0, 1.03 * max(max(values) for values in tokens_of.values())]),
            "yaxis": axis("share of responses", tickformat=".0%", range=[0, 1.03]),
            "hovermode": "closest",
        },
        "A jump at the right end means that responses were cut at the limit. Click a struck-out policy to show it.",
    )
    return [distribution, *_ended_along_training(run)]


def _ended_along_training(run: Run) -> list[Figure]:
    """The share of responses that end by themselves, at SFT and at each checkpoint of both arms."""
    rows = run.results["policies"]
    start = [row for row in rows if row["kind"] == "sft"]
    traces = []
    for arm in ("rm_ppo", "dpo"):
        trained = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["step"])
        if not trained:
            continue
        points = start + trained
        last = max(row["step"] for row in trained) or 1
        rates = [row["eos_rate"] for row in points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": ARM_NAMES[arm],
                "x": [row["step"] / last for row in points],
                "y": [rate["value"] for rate in rates],
                "error_y": interval_bars([(rate["value"], rate) for rate in rates], color(arm)),
                "text": [policy_name(row["policy"]) for row in points],
                "hovertemplate": "<b>%{text}</b><br>%{y:.1%}<extra></extra>",
                "line": {"color": color(arm), "width": 2},
                "marker": {"color": color(arm), "size": 7},
            }
        )
    if not traces:
        return []
    title = "Share that ends by itself"
    layout = {
        "xaxis": axis("share of the arm's training", tickformat=".0%"),
        "yaxis": axis("share of responses", tickformat=".0%", rangemode="tozero"),
        "hovermode": "closest",
    }
    return [Figure("along-eos_rate", title, f"{title} at SFT and along the training of both arms.", traces, layout)]
