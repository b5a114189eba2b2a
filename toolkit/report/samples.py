"""Side-by-side samples: one row per held-out prompt, a cell per policy, and what the filters ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.preferences.samples import Sample, by_policy, by_prompt
from toolkit.report.plots import policy_name
from toolkit.report.reading import Row, Run, grouped
from toolkit.report.tables import arm_of

FLAGS = ("rewards", "gold", "judges", "truncated")
_ORDER = {"rm_ppo": 0, "dpo": 1, "sft": 2, "base": 3}


def browser(runs: Sequence[Run], max_samples: int) -> Row | None:
    """The data of the sample browser; None where no run has samples.

    ``columns``: ``{label, run, policy, color, shown}``. ``rows``: ``{id, prompt, cells, judged, flags, ...}`` with
    ``cells[column]`` a list of ``[text, tokens, truncated, gold, explicit, implicit]``, null where that policy did
    not answer that prompt. ``judged`` lists ``[run, judge, mean preference for RM + PPO over DPO]``.
    """
    columns, cells_of = [], []
    for number, run in enumerate(runs):
        final = [sample for sample in run.samples if sample.kind != "checkpoint"]
        for policy, samples in sorted(by_policy(final).items(), key=lambda item: _ORDER.get(item[0], 4)):
            several = len(runs) > 1
            columns.append(
                {
                    "label": policy_name(policy) + (f" · {run.name}" if several else ""),
                    "run": number,
                    "policy": policy,
                    "color": arm_of(policy),
                    "shown": policy in ("rm_ppo", "dpo") if several else True,
                }
            )
            cells_of.append(by_prompt(samples))
    prompts: dict[str, str] = {}
    for run in runs:
        for sample in run.samples:
            prompts.setdefault(sample.prompt_id, sample.prompt)
    if not prompts:
        return None
    judged = [_judged(run) for run in runs]
    rows = []
    for prompt_id, prompt in list(prompts.items())[:max_samples]:
        cells = [_cell(by_prompt.get(prompt_id)) for by_prompt in cells_of]
        opinions = [
            [number, judge, preference]
            for number, by_prompt in enumerate(judged)
            for judge, preference in by_prompt.get(prompt_id, {}).items()
        ]
        rows.append(
            {"id": prompt_id, "prompt": prompt, "cells": cells, "judged": opinions}
            | _facts(columns, cells, opinions, len(runs))
        )
    return {
        "columns": columns,
        "rows": rows,
        "total": len(prompts),
        "runs": [run.name for run in runs],
        "flags": {flag: sum(flag in row["flags"] for row in rows) for flag in FLAGS},
        "gold": any(run.has_gold for run in runs),
    }


def _cell(samples: Sequence[Sample] | None) -> list[list[Any]] | None:
    if not samples:
        return None
    return [
        [
            sample.response,
            sample.n_tokens,
            int(sample.truncated),
            *map(_short, (sample.gold_reward, sample.explicit_reward, sample.implicit_reward)),
        ]
        for sample in sorted(samples, key=lambda sample: sample.sample_index)
    ]


def _facts(columns: list[Row], cells: list[Any], opinions: list[list[Any]], n_runs: int) -> Row:
    """What filters and orders ask of a row; over several runs the larger margin, and a flag that any run sets."""
    explicit, implicit, gold, flags = 0.0, 0.0, 0.0, set()
    for run in range(n_runs):
        sides = {c["policy"]: cell for c, cell in zip(columns, cells, strict=True) if c["run"] == run and cell}
        if "rm_ppo" in sides and "dpo" in sides:
            difference = [_mean(sides["rm_ppo"], k) - _mean(sides["dpo"], k) for k in (4, 5)]
            explicit, implicit = (max(m, abs(d)) for m, d in zip((explicit, implicit), difference, strict=True))
            if difference[0] * difference[1] < 0:
                flags.add("rewards")
            if sides["rm_ppo"][0][3] is not None and sides["dpo"][0][3] is not None:
                true = _mean(sides["rm_ppo"], 3) - _mean(sides["dpo"], 3)
                gold = max(gold, abs(true))
                if true * difference[0] < 0:
                    flags.add("gold")
        sides_taken = {(p > 0.5) - (p < 0.5) for number, _, p in opinions if number == run and p is not None}
        if {1, -1} <= sides_taken:
            flags.add("judges")
    answers = [sample for cell in cells if cell for sample in cell]
    if any(sample[2] for sample in answers):
        flags.add("truncated")
    longest = max((sample[1] for sample in answers), default=0)
    margins = {"explicit": _short(explicit), "implicit": _short(implicit), "gold": _short(gold)}
    return {"flags": sorted(flags), "longest": longest, **margins}


def _judged(run: Run) -> dict[str, dict[str, float]]:
    """Prompt -> judge -> mean preference for RM + PPO over DPO; failed judgements left out."""
    pairs = [
        row
        for row in run.judgements
        if (row["policy"], row["baseline"]) == ("rm_ppo", "dpo") and row["preference"] is not None
    ]
    return {
        prompt: {
            judge: round(sum(row["preference"] for row in own) / len(own), 3)
            for judge, own in grouped(rows, "judge").items()
        }
        for prompt, rows in grouped(pairs, "prompt_id").items()
    }


def _mean(cell: list[list[Any]], place: int) -> float:
    return sum(float(sample[place]) for sample in cell) / len(cell)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
