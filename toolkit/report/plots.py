"""The report's figures, as Plotly traces in JSON.

A colour is written ``"@name"`` or ``"@name/alpha"`` and resolved in the browser against :data:`PALETTE`, so that one
figure serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from toolkit.preferences.samples import by_policy
from toolkit.report.reading import Row, Run, grouped

# rm_ppo and dpo are an orange and a blue that stay apart under every common colour blindness; all else is neutral.
PALETTE = {
    "light": {
        "paper": "#fcfcfb",
        "panel": "#ffffff",
        "sunken": "#f4f4f2",
        "ink": "#191c20",
        "muted": "#5c636b",
        "line": "#dcdedd",
        "rm_ppo": "#b2480b",
        "dpo": "#1d5fa8",
        "sft": "#5d6670",
        "base": "#777f88",
        "best_of_n": "#4f5860",
        "warn": "#8a5a00",
        "mark": "#fbe7a1",
    },
    "dark": {
        "paper": "#14171a",
        "panel": "#1a1e22",
        "sunken": "#20252a",
        "ink": "#e7e9ea",
        "muted": "#9ea6ad",
        "line": "#353b41",
        "rm_ppo": "#f09355",
        "dpo": "#6fb0f2",
        "sft": "#a9b2ba",
        "base": "#8d969e",
        "best_of_n": "#bcc4cb",
        "warn": "#e3b341",
        "mark": "#6b5510",
    },
}
ARM_NAMES = {"rm_ppo": "RM + PPO", "dpo": "DPO", "sft": "SFT", "base": "base"}
REWARDS = {"gold_reward": "gold reward", "explicit_reward": "explicit reward", "implicit_reward": "implicit reward"}
# The explicit reward is what PPO climbs, the implicit one DPO's own: they carry their arm's colour.
REWARD_COLOR = {"gold_reward": "@ink", "explicit_reward": "@rm_ppo", "implicit_reward": "@dpo"}
MAX_POINTS = 2000
# Figures whose axes mean the same in every run.
SHARED = ("frontier-", "over-", "margins", "by-margin")
Figure = dict[str, Any]
# The start of an arm is SFT, which has a trace of its own.
_SIZE = {"final": 11, "start": 0, "best_of_n": 9}


def policy_name(policy: str) -> str:
    """``"RM + PPO"``, ``"DPO, step 6"``, ``"best of 4 by RM"``."""
    head, _, step = policy.partition("@")
    if head.startswith("best_of_"):
        n, _, by = head.removeprefix("best_of_").partition("_")
        return f"best of {n} by {'RM' if by == 'rm' else by}"
    return ARM_NAMES.get(head, head) + (f", step {step}" if step else "")


def color(arm: str) -> str:
    return "@best_of_n" if arm.startswith("best_of_") else f"@{arm}" if arm in ARM_NAMES else "@muted"


def figure(name: str, title: str, alt: str, traces: list[Row], *, note: str = "", **layout: Any) -> Figure:
    """``name`` becomes part of the element's id; ``alt`` says in words what is drawn."""
    return {"name": name, "title": title, "alt": alt, "note": note, "traces": traces, "layout": layout}


def axis(title: str, **more: Any) -> Row:
    return {"title": {"text": title}, **more}


def frontier(run: Run) -> list[Figure]:
    """Each reward, and each judge's win rate over SFT, against KL: both arms with their checkpoints, and best-of-n."""
    rows = run.results.get("frontier", [])
    if not any(row["arm"] in ("rm_ppo", "dpo") for row in rows):
        return []
    figures = []
    for reward, label in REWARDS.items():
        known = [
            {**row, "y": row[reward]["value"], "y_ci": row[reward]} for row in rows if row[reward]["value"] is not None
        ]
        if known:
            traces = _curves(known, ".3f")
            alt = f"Mean {label} of every policy against its KL divergence from SFT. " + _in_words(known, ".3f")
            figures.append(
                figure(f"frontier-{reward}", f"{label.capitalize()} against KL", alt, traces, **_against_kl(label))
            )
    judges = dict.fromkeys(judge for row in rows for judge in row["win_rate_over_sft"])
    for number, judge in enumerate(judges):
        known = [
            {**row, "y": rate["win_rate"], "y_ci": rate}
            for row in rows
            if (rate := row["win_rate_over_sft"].get(judge)) and rate["win_rate"] is not None
        ]
        start = [{**row, "y": 0.5, "y_ci": {"ci_low": 0.5, "ci_high": 0.5}} for row in rows if row["kind"] == "sft"]
        if known:
            layout = _against_kl("win rate over SFT")
            layout["yaxis"] |= {"tickformat": ".0%"}
            layout["shapes"] = [_level(0.5)]
            alt = f"Win rate over SFT, judge {judge}, against KL from SFT. " + _in_words(known, ".1%")
            title = f"Win rate over SFT against KL, judge {judge}"
            figures.append(figure(f"frontier-win-{number}", title, alt, _curves(start + known, ".1%"), **layout))
    return figures


def _against_kl(label: str) -> Row:
    return {"xaxis": axis("KL to SFT, nats per response", zeroline=True), "yaxis": axis(label), "hovermode": "closest"}


def _level(y: float) -> Row:
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line, "layer": "below"}


def _curves(rows: Sequence[Row], form: str) -> list[Row]:
    """One trace per arm, SFT first in each, and one per best-of-n policy. ``form`` formats y for the hover."""
    start = [row for row in rows if row["kind"] == "sft"]
    traces = []
    for arm in ("rm_ppo", "dpo"):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["step"])
        if own:
            points = [{**row, "kind": "start"} for row in start] + own
            traces.append(_trace(points, ARM_NAMES[arm], color(arm), form, mode="lines+markers"))
    for name, own in grouped([row for row in rows if row["kind"] == "best_of_n"], "policy").items():
        trace = _trace(own, policy_name(name), "@best_of_n", form, mode="markers")
        trace["marker"]["symbol"] = "diamond" if name.endswith("_rm") else "diamond-open"
        traces.append(trace)
    if start:
        trace = _trace(start, "SFT", "@sft", form, mode="markers")
        trace["marker"] |= {"symbol": "circle-open", "size": 10, "line": {"width": 2, "color": "@sft"}}
        traces.append(trace)
    return traces


def _trace(rows: Sequence[Row], name: str, shade: str, form: str, *, mode: str) -> Row:
    hover = []
    for row in rows:
        low, high = row["y_ci"].get("ci_low"), row["y_ci"].get("ci_high")
        interval = f" ({low:{form}} to {high:{form}})" if low is not None and high is not None else ""
        spread = row.get("kl_standard_error")
        bound = " at most" if row["kind"] == "best_of_n" else ""
        kl = f"KL{bound} {row['kl_nats']:.2f}" + (f" ± {spread:.2f}" if spread else "") + " nats"
        label = "SFT (start)" if row["kind"] == "start" else policy_name(row["policy"])
        step = f", step {row['step']}" if row["kind"] == "final" and row["step"] else ""
        hover.append(f"<b>{label}{step}</b><br>{row['y']:{form}}{interval}<br>{kl}")
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [row["kl_nats"] for row in rows],
        "y": [row["y"] for row in rows],
        "error_x": _standard_errors(rows, shade),
        "error_y": interval_bars([(row["y"], row["y_ci"]) for row in rows], shade),
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": shade, "width": 2},
        "marker": {
            "color": shade,
            "size": [_SIZE.get(row["kind"], 7) for row in rows],
            "opacity": 1,
            "line": {"width": 0},
        },
    }


def interval_bars(points: Sequence[tuple[float, Mapping[str, Any]]], shade: str) -> Row:
    """Error bars from ``ci_low`` to ``ci_high`` of each (value, estimate); none where there is no interval."""
    up = [None if e["ci_high"] is None else e["ci_high"] - value for value, e in points]
    down = [None if e["ci_low"] is None else value - e["ci_low"] for value, e in points]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return bars | {"color": f"{shade}/0.45", "thickness": 1, "width": 3}


def _standard_errors(rows: Sequence[Row], shade: str) -> Row:
    errors = [row.get("kl_standard_error") for row in rows]
    return {"type": "data", "array": errors, "color": f"{shade}/0.45", "thickness": 1, "width": 3}


def _in_words(rows: Sequence[Row], form: str) -> str:
    return (
        "; ".join(f"{policy_name(row['policy'])}: {row['y']:{form}} at {row['kl_nats']:.2f} nats" for row in rows) + "."
    )


def overoptimization(run: Run) -> list[Figure]:
    """Rewards above SFT's against sqrt(KL), one figure per arm, with Gao et al.'s curve where it could be fitted."""
    found = run.results.get("overoptimization", {})
    figures = []
    for arm in ("rm_ppo", "dpo"):
        rows = sorted(found.get(arm, {}).get("rows", []), key=lambda row: row["step"])
        if not rows:
            continue
        traces = []
        for reward, label in REWARDS.items():
            points = [row for row in rows if row[reward] is not None]
            if not points:
                continue
            shade = REWARD_COLOR[reward]
            hover = [
                f"<b>{policy_name(p['policy'])}</b><br>{label} {p[reward]:+.3f}<br>KL {p['kl_nats']:.2f} nats"
                for p in points
            ]
            fit = (found[arm].get("fits", {}).get(reward) or {}).get("rl")
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers" if fit else "lines+markers",
                    "name": label,
                    "x": [0.0, *(p["sqrt_kl"] for p in points)],
                    "y": [0.0, *(p[reward] for p in points)],
                    "text": ["<b>SFT</b>", *hover],
                    "hovertemplate": "%{text}<extra></extra>",
                    "line": {"color": shade, "width": 2},
                    "marker": {"color": shade, "size": 7},
                }
            )
            if fit:
                traces.append(_fitted(fit, max(p["sqrt_kl"] for p in points), f"{label}, fit", shade))
        alt = f"Rewards of {ARM_NAMES[arm]} above those of SFT, by checkpoint, against the square root of KL."
        layout: Row = {"xaxis": axis("√KL to SFT, √nats"), "yaxis": axis("reward above SFT's"), "shapes": [_level(0.0)]}
        if traces:
            figures.append(figure(f"over-{arm}", ARM_NAMES[arm], alt, traces, **layout))
    return figures


def _fitted(fit: Mapping[str, Any], reach: float, name: str, shade: str) -> Row:
    d = np.linspace(reach / 60, reach * 1.1, 60)
    y = d * (fit["a"] - fit["b"] * np.log(d))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _round(d),
        "y": _round(y),
        "line": {"color": shade, "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def margins(run: Run) -> list[Figure]:
    """Implicit against explicit margin of every pair of held-out responses to the same prompt, explicit margin >= 0."""
    pairs = []
    for rows in grouped(run.rewards, "prompt_id").values():
        for a, b in combinations(rows, 2):
            if a["explicit_reward"] < b["explicit_reward"]:
                a, b = b, a
            known = a["gold_reward"] is not None and b["gold_reward"] is not None
            gold = a["gold_reward"] - b["gold_reward"] if known else None
            pairs.append(
                (a["explicit_reward"] - b["explicit_reward"], a["implicit_reward"] - b["implicit_reward"], gold)
            )
    if not pairs:
        return []
    kept = pairs[:: math.ceil(len(pairs) / MAX_POINTS)]
    groups = {
        "gold sides with the explicit order": [p for p in kept if p[2] is not None and p[2] > 0],
        "gold sides against it": [p for p in kept if p[2] is not None and p[2] < 0],
        "pairs" if not run.has_gold else "gold ties": [p for p in kept if p[2] is None or p[2] == 0],
    }
    looks = (
        ("@ink/0.55", "circle"),
        ("@warn/0.75", "x-thin"),
        ("@muted/0.8", "circle-open") if run.has_gold else ("@ink/0.55", "circle"),
    )
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": _round([p[0] for p in points]),
            "y": _round([p[1] for p in points]),
            "marker": {"color": shade, "size": 5, "symbol": symbol}
            | ({} if symbol == "circle" else {"line": {"color": shade, "width": 1.4}}),
            "hovertemplate": "explicit %{x:+.3f}<br>implicit %{y:+.3f}<extra></extra>",
        }
        for (name, points), (shade, symbol) in zip(groups.items(), looks, strict=True)
        if points
    ]
    note = "Each pair is turned so that its explicit margin is positive: above the line both rewards agree."
    if len(kept) < len(pairs):
        note += f" One pair in {math.ceil(len(pairs) / MAX_POINTS)} of {len(pairs):,} is drawn."
    agree = sum(p[0] * p[1] > 0 for p in pairs) / len(pairs)
    alt = (
        f"Implicit against explicit reward margin of {len(pairs)} pairs within prompts; {agree:.0%} have the same sign."
    )
    layout = {"xaxis": axis("explicit margin"), "yaxis": axis("implicit margin"), "shapes": [_level(0.0)]}
    layout["hovermode"] = "closest"
    return [figure("margins", "Margins of the same pairs under both rewards", alt, traces, note=note, **layout)]


def reliability(run: Run) -> list[Figure]:
    """Accuracy against confidence of the explicit and of the implicit reward, on held-out comparisons."""
    traces: list[Row] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0.5, 1.0],
            "y": [0.5, 1.0],
            "line": {"color": "@muted", "width": 1, "dash": "dot"},
            "name": "calibrated",
            "hoverinfo": "skip",
        }
    ]
    by_margin = []
    for kind, shade in (("explicit", "@rm_ppo"), ("implicit", "@dpo")):
        quality = run.results.get("rm_quality", {}).get(kind)
        if not quality:
            continue
        bins = [b for b in quality["reliability"] if b["n"]]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{kind} reward",
                "x": _round([b["confidence"] for b in bins]),
                "y": _round([b["accuracy"] for b in bins]),
                "line": {"color": shade, "width": 1.5},
                # The area says how many comparisons stand behind the point.
                "marker": {
                    "color": shade,
                    "size": [5 + 17 * math.sqrt(b["share"]) for b in bins],
                    "opacity": 0.85,
                    "line": {"width": 0},
                },
                "text": [f"{b['n']} comparisons, {b['share']:.0%}" for b in bins],
                "hovertemplate": "confidence %{x:.1%}<br>accuracy %{y:.1%}<br>%{text}<extra></extra>",
            }
        )
        fifths = quality["accuracy_by_margin"]
        by_margin.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{kind} reward",
                "x": _round([f["margin"] for f in fifths]),
                "y": _round([f["value"] for f in fifths]),
                "error_y": interval_bars([(f["value"], f) for f in fifths], shade),
                "line": {"color": shade, "width": 1.5},
                "marker": {"color": shade, "size": 7},
                "hovertemplate": "margin %{x:.3f}<br>accuracy %{y:.1%}<extra></extra>",
            }
        )
    if not by_margin:
        return []
    percent = {"tickformat": ".0%"}
    first = figure(
        "reliability",
        "Reliability",
        "Share of held-out comparisons ordered right, against the confidence that the reward margin implies.",
        traces,
        note="On the dotted line a reward is as often right as it claims. A larger point stands for more comparisons.",
        xaxis=axis("confidence, sigmoid of the margin", **percent, range=[0.48, 1.02]),
        yaxis=axis("accuracy", **percent),
        hovermode="closest",
    )
    second = figure(
        "by-margin",
        "Accuracy by size of the margin",
        "Accuracy on held-out comparisons in fifths of the reward margin's size.",
        by_margin,
        note="Comparisons in fifths by the size of the margin: a useful reward is surer where it is right.",
        xaxis=axis("mean |margin| of the fifth"),
        yaxis=axis("accuracy", **percent),
        shapes=[_level(0.5)],
        hovermode="closest",
    )
    return [first, second]


def lengths(run: Run) -> list[Figure]:
    """Distribution of response lengths of the final policies."""
    tokens_of = {
        name: [sample.n_tokens for sample in samples]
        for name, samples in by_policy(run.samples).items()
        if samples[0].kind != "checkpoint"
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
                "y": _round([0.0, *np.cumsum(counts) / len(values)]),
                "line": {"color": color(name), "width": 2, "shape": "hv", "dash": "dot" if minor else "solid"},
                "visible": "legendonly" if minor else True,
                "hovertemplate": "up to %{x} tokens: %{y:.1%}<extra>" + policy_name(name) + "</extra>",
            }
        )
    means = "; ".join(f"{policy_name(name)}: mean {np.mean(values):.1f}" for name, values in tokens_of.items())
    distribution = figure(
        "lengths",
        "Share of responses that are no longer than",
        f"Cumulative distribution of response lengths in tokens. {means}.",
        traces,
        note="A jump at the right end is responses cut at the limit. Policies that are struck out show on a click.",
        xaxis=axis("tokens", range=[0, 1.03 * max(max(values) for values in tokens_of.values())]),
        yaxis=axis("share of responses", tickformat=".0%", range=[0, 1.03]),
        hovermode="closest",
    )
    return [distribution, *_along_training(run, "eos_rate", "Share that ends by itself", ".1%")]


def _along_training(run: Run, column: str, title: str, form: str) -> list[Figure]:
    """A measure of the policies at SFT and at each checkpoint of both arms, by share of the arm's training."""
    rows = run.results["policies"]
    start = [row for row in rows if row["kind"] == "sft"]
    traces = []
    for arm in ("rm_ppo", "dpo"):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["step"])
        if not own:
            continue
        points = start + own
        last = max(row["step"] for row in own) or 1
        shade = color(arm)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": ARM_NAMES[arm],
                "x": [row["step"] / last for row in points],
                "y": [row[column]["value"] for row in points],
                "error_y": interval_bars([(row[column]["value"], row[column]) for row in points], shade),
                "text": [policy_name(row["policy"]) for row in points],
                "hovertemplate": f"<b>%{{text}}</b><br>%{{y:{form}}}<extra></extra>",
                "line": {"color": shade, "width": 2},
                "marker": {"color": shade, "size": 7},
            }
        )
    if not traces:
        return []
    alt = f"{title} at SFT and along the training of both arms."
    x = axis("share of the arm's training", tickformat=".0%")
    y = axis("share of responses", tickformat=".0%", rangemode="tozero")
    return [figure(f"along-{column}", title, alt, traces, xaxis=x, yaxis=y, hovermode="closest")]


def share_axes(figures: Sequence[Figure]) -> None:
    """Give figures of the same name in several runs the same ranges, so that they can be compared by eye.

    Training curves keep their own: their steps are not the same thing in two runs.
    """
    for group in grouped([f for f in figures if f["name"].startswith(SHARED)], "name").values():
        for axis_name in "xy":
            ends = [end for made in group for trace in made["traces"] for end in _ends(trace, axis_name)]
            margin = 0.06 * (max(ends) - min(ends)) or 0.5
            for made in group:
                made["layout"][f"{axis_name}axis"].setdefault("range", [min(ends) - margin, max(ends) + margin])


def _ends(trace: Row, axis_name: str) -> list[float]:
    """The values of a trace on one axis, and the ends of their error bars."""
    values, bars = trace[axis_name], trace.get(f"error_{axis_name}", {})
    up = bars.get("array") or [None] * len(values)
    down = bars.get("arrayminus") or up
    out = list(values)
    out += [value + more for value, more in zip(values, up, strict=True) if more is not None]
    return out + [value - less for value, less in zip(values, down, strict=True) if less is not None]


def _round(values: Any) -> list[float]:
    """Five significant digits are more than a pixel shows, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in values]
