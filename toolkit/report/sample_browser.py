"""Side-by-side samples: one row per held-out prompt, one cell per policy, and what the page's filters need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evals.summary import grouped
from toolkit.preferences.samples import Sample, by_policy, by_prompt
from toolkit.report.names import arm_of, policy_name
from toolkit.report.reading import Run
from toolkit.report.render import embedded

FLAGS = ("rewards", "gold", "judges", "truncated")
_ORDER = {"rm_ppo": 0, "dpo": 1, "sft": 2, "base": 3}


@dataclass(frozen=True)
class Column:
    """A final policy of a run. ``samples`` are its responses by prompt id, in the order of their drawing."""

    run: int
    policy: str
    samples: dict[str, list[Sample]]

    def header(self, run_name: str, n_runs: int) -> dict[str, Any]:
        """Of several runs the page names the run, and shows only the two arms at first."""
        return {
            "label": policy_name(self.policy) + (f" · {run_name}" if n_runs > 1 else ""),
            "run": self.run,
            "policy": self.policy,
            "color": arm_of(self.policy),
            "shown": self.policy in ("rm_ppo", "dpo") if n_runs > 1 else True,
        }

    def cell(self, prompt_id: str) -> list[list[Any]] | None:
        """Each response with its facts, or None where the policy did not answer the prompt."""
        return [
            [
                sample.response,
                sample.n_tokens,
                int(sample.truncated),
                *map(_short, (sample.gold_reward, sample.explicit_reward, sample.implicit_reward)),
            ]
            for sample in self.samples.get(prompt_id, [])
        ] or None


@dataclass(frozen=True)
class ArmPreference:
    """The mean preference of a judge for RM + PPO over DPO on one prompt of a run."""

    run: int
    judge: str
    preference: float


def browser(runs: Sequence[Run], max_samples: int) -> dict[str, Any] | None:
    """The data of the sample browser, as JSON. None where no run has samples.

    ``columns``: ``{label, run, policy, color, shown}``. ``rows``: ``{id, prompt, cells, judged, flags, longest,
    explicit, implicit, gold}``. ``cells[column]`` is a list of ``[text, tokens, truncated, gold, explicit, implicit]``,
    or null where that policy did not answer that prompt. ``judged`` lists ``[run, judge, mean preference for RM + PPO
    over DPO]``. ``longest`` counts tokens; the rewards are the absolute differences between the arms.
    """
    columns = [column for number, run in enumerate(runs) for column in _columns(number, run)]
    prompts: dict[str, str] = {}
    for run in runs:
        for sample in run.samples:
            prompts.setdefault(sample.prompt_id, sample.prompt)
    if not prompts:
        return None
    preferences = [preference for number, run in enumerate(runs) for preference in _arm_preferences(number, run)]
    by_id: dict[str, list[ArmPreference]] = {}
    for prompt_id, preference in preferences:
        by_id.setdefault(prompt_id, []).append(preference)
    rows = [
        {
            "id": prompt_id,
            "prompt": prompt,
            "cells": [column.cell(prompt_id) for column in columns],
            "judged": [[p.run, p.judge, p.preference] for p in by_id.get(prompt_id, [])],
            **_filter_values(columns, prompt_id, by_id.get(prompt_id, []), len(runs)),
        }
        for prompt_id, prompt in list(prompts.items())[:max_samples]
    ]
    return {
        "columns": [column.header(runs[column.run].name, len(runs)) for column in columns],
        "rows": rows,
        "total": len(prompts),
        "runs": [run.name for run in runs],
        "flags": {flag: sum(flag in row["flags"] for row in rows) for flag in FLAGS},
        "gold": any(run.has_gold for run in runs),
    }


def n_rows_less(browser: dict[str, Any], n_bytes: int) -> int:
    """How many of a browser's rows remain, at least 1, where the last ones are left out that take so many bytes of the
    page."""
    rows = browser["rows"]
    n = len(rows)
    while n > 1 and n_bytes > 0:
        n -= 1
        n_bytes -= len(embedded(rows[n]).encode())
    return n


def _columns(number: int, run: Run) -> list[Column]:
    final = [sample for sample in run.samples if sample.kind not in ("checkpoint", "round")]
    policies = sorted(by_policy(final).items(), key=lambda item: _ORDER.get(item[0], 4))
    return [
        Column(
            number,
            policy,
            {prompt_id: sorted(drawn, key=lambda s: s.sample_index) for prompt_id, drawn in by_prompt(samples).items()},
        )
        for policy, samples in policies
    ]


def _arm_preferences(number: int, run: Run) -> list[tuple[str, ArmPreference]]:
    """The preferences with the ids of their prompts. Failed judgements are left out."""
    judged = [
        row
        for row in run.judgements
        if (row["policy"], row["baseline"]) == ("rm_ppo", "dpo") and row["preference"] is not None
    ]
    return [
        (prompt_id, ArmPreference(number, judge, round(sum(row["preference"] for row in rows) / len(rows), 3)))
        for prompt_id, of_prompt in grouped(judged, "prompt_id").items()
        for judge, rows in grouped(of_prompt, "judge").items()
    ]


def _filter_values(
    columns: Sequence[Column], prompt_id: str, preferences: Sequence[ArmPreference], n_runs: int
) -> dict[str, Any]:
    """What filters and orders need of a row. Over several runs: the largest difference, and the flags of any run."""
    largest = {"explicit": 0.0, "implicit": 0.0, "gold": 0.0}
    flags = set()
    for run in range(n_runs):
        sides = {c.policy: c.samples[prompt_id] for c in columns if c.run == run and prompt_id in c.samples}
        if "rm_ppo" in sides and "dpo" in sides:
            explicit = _difference(sides["rm_ppo"], sides["dpo"], lambda sample: sample.explicit_reward)
            implicit = _difference(sides["rm_ppo"], sides["dpo"], lambda sample: sample.implicit_reward)
            gold = _difference(sides["rm_ppo"], sides["dpo"], lambda sample: sample.gold_reward)
            for name, value in (("explicit", explicit), ("implicit", implicit), ("gold", gold)):
                largest[name] = max(largest[name], abs(value or 0.0))
            if explicit is not None and implicit is not None and explicit * implicit < 0:
                flags.add("rewards")
            if explicit is not None and gold is not None and explicit * gold < 0:
                flags.add("gold")
        verdicts = {(p.preference > 0.5) - (p.preference < 0.5) for p in preferences if p.run == run}
        if {1, -1} <= verdicts:
            flags.add("judges")
    answers = [sample for column in columns for sample in column.samples.get(prompt_id, [])]
    if any(sample.truncated for sample in answers):
        flags.add("truncated")
    longest = max((sample.n_tokens for sample in answers), default=0)
    return {"flags": sorted(flags), "longest": longest, **{name: _short(value) for name, value in largest.items()}}


def _difference(
    first: Sequence[Sample], second: Sequence[Sample], reward: Callable[[Sample], float | None]
) -> float | None:
    """Difference of the mean rewards, as the page shows the rewards. None where a sample has none."""
    a, b = _mean(map(reward, first)), _mean(map(reward, second))
    return None if a is None or b is None else a - b


def _mean(values: Iterable[float | None]) -> float | None:
    shown = [_short(value) for value in values]
    known = [value for value in shown if value is not None]
    return sum(known) / len(known) if len(known) == len(shown) else None


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
