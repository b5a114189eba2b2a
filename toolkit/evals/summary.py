"""What the tables of an evaluation say, each number with its interval: the statistical part of ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.evals.agreement import LOG_Z_WARNING, Comparison, compare_on_samples, compare_rewards
from toolkit.evals.hacking import corpus_drift, drift, text_features
from toolkit.evals.intervals import bootstrap_mean
from toolkit.evals.overoptimization import best_of_n_kl, overoptimization
from toolkit.evals.rm_quality import rm_quality
from toolkit.evals.winrate import average_within_prompt

Row = Mapping[str, Any]
SCHEMA_VERSION = 1
# Judges that an arm was trained on (or is) cannot decide between the arms.
TRAINED_ON = {
    "rm": "the reward model that PPO was trained against",
    "implicit": "the implicit reward of DPO's own policy",
}


def summarise(
    samples: Sequence[Row],
    rewards: Sequence[Row],
    win_rates: Sequence[Row],
    comparisons: Sequence[Comparison],
    *,
    best_of_n: int,
    n_resamples: int,
    confidence: float,
    seed: int,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """``results.json`` without ``recipe`` and ``cost``.

    ``samples`` and ``rewards`` are rows of ``samples.parquet`` and ``rewards.parquet``, ``win_rates`` the contract's,
    ``comparisons`` the held-out ones as (prompt, i, j, p, weight) over the prompts of ``rewards`` in their order.
    """
    options: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    notes = list(warnings)
    policies = [policy_row(name, rows, best_of_n, options) for name, rows in grouped(samples, "policy").items()]
    frontier = frontier_rows(policies, win_rates)
    explicit, implicit, lengths, prompt_ids = _by_prompt(rewards)
    against = compare_rewards(prompt_ids, comparisons, explicit, implicit, **options)
    quality = {
        "explicit": rm_quality(comparisons, explicit, lengths=lengths, **options),
        "implicit": rm_quality(comparisons, implicit, lengths=lengths, **options),
    }
    hacking = {
        name: hacking_rows(rows, grouped(samples, "policy")["sft"], options)
        for name, rows in grouped(samples, "policy").items()
        if rows[0]["kind"] in ("final", "best_of_n")
    }
    for name, found in hacking.items():
        flagged = [row["feature"] for row in found if row["flagged"]]
        if flagged:
            notes.append(f"{name} drifts from sft in {', '.join(flagged)}")
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(win_rates),
        "policies": policies,
        "win_rates": [dict(row) for row in win_rates],
        "implicit_vs_explicit": {
            "held_out": against,
            "on_samples": _on_samples(samples, options),
            "warning": LOG_Z_WARNING,
        },
        "frontier": frontier,
        "overoptimization": overoptimization_by_arm(policies),
        "hacking": hacking,
        "rm_quality": quality,
        "warnings": notes,
    }


def grouped(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """Rows by the value of a column, in order of first appearance."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row[column], []).append(row)
    return out


def mean_of(rows: Sequence[Row], column: str, options: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Mean over prompts (a prompt's samples averaged first) with its interval; nulls where the column is."""
    if any(row[column] is None for row in rows):
        return {"value": None, "standard_error": None, "ci_low": None, "ci_high": None, "n": 0}
    _, means = average_within_prompt([row["prompt_id"] for row in rows], [float(row[column]) for row in rows])
    estimate = bootstrap_mean(means, **options)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "n": estimate.n,
    }


def policy_row(name: str, rows: Sequence[Row], best_of_n: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """One policy: rewards, KL to SFT (nats per response), length, end-of-text rate."""
    first = rows[0]
    kl = mean_of(rows, "kl_nats", options)
    if first["kind"] == "best_of_n":
        # Selection changes the distribution, not the log-probabilities: the known bound takes the estimate's place.
        kl = {"value": best_of_n_kl(best_of_n), "standard_error": None, "ci_low": None, "ci_high": None, "n": kl["n"]}
    elif first["kind"] == "sft":
        kl = {"value": 0.0, "standard_error": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n": kl["n"]}
    ended = [{**row, "ended": 0.0 if row["truncated"] else 1.0} for row in rows]
    return {
        "policy": name,
        "arm": first["arm"],
        "kind": first["kind"],
        "step": first["step"],
        "n_prompts": len({row["prompt_id"] for row in rows}),
        "n_samples": len(rows),
        "gold_reward": mean_of(rows, "gold_reward", options),
        "explicit_reward": mean_of(rows, "explicit_reward", options),
        "implicit_reward": mean_of(rows, "implicit_reward", options),
        "kl_nats": kl["value"],
        "kl_standard_error": kl["standard_error"],
        "kl_ci_low": kl["ci_low"],
        "kl_ci_high": kl["ci_high"],
        "length_tokens": mean_of(rows, "n_tokens", options),
        "eos_rate": mean_of(ended, "ended", options),
    }


def frontier_rows(policies: Sequence[Row], win_rates: Sequence[Row]) -> list[dict[str, Any]]:
    """Reward and win rate against KL: SFT, both arms with their checkpoints, and best-of-n."""
    over_sft = {(row["policy"], row["judge"]): row for row in win_rates if row["baseline"] == "sft"}
    out = []
    for row in policies:
        if row["kind"] == "base":
            continue
        kl = row["kl_nats"]
        out.append(
            {
                "policy": row["policy"],
                "arm": row["arm"],
                "kind": row["kind"],
                "step": row["step"],
                "kl_nats": kl,
                "kl_standard_error": row["kl_standard_error"],
                "sqrt_kl": math.sqrt(max(kl, 0.0)) if kl is not None else None,
                "gold_reward": row["gold_reward"],
                "explicit_reward": row["explicit_reward"],
                "implicit_reward": row["implicit_reward"],
                "win_rate_over_sft": {
                    judge: {key: rate[key] for key in ("win_rate", "ci_low", "ci_high")}
                    for (name, judge), rate in over_sft.items()
                    if name == row["policy"]
                },
            }
        )
    return out


def overoptimization_by_arm(policies: Sequence[Row]) -> dict[str, Any]:
    """Proxy, implicit and gold reward above SFT's by checkpoint against sqrt(KL), with Gao et al.'s fit of each arm."""
    start = next(row for row in policies if row["kind"] == "sft")
    out: dict[str, Any] = {}
    for arm in ("rm_ppo", "dpo"):
        rows = []
        for row in policies:
            if row["arm"] != arm:
                continue
            point: dict[str, Any] = {
                "policy": row["policy"],
                "step": row["step"],
                "kind": "rl",
                "kl_nats": max(row["kl_nats"], 0.0),  # an estimate near 0 may fall below it
            }
            point["sqrt_kl"] = math.sqrt(point["kl_nats"])
            for reward in ("gold_reward", "explicit_reward", "implicit_reward"):
                value, origin = row[reward]["value"], start[reward]["value"]
                point[reward] = None if value is None or origin is None else value - origin
            rows.append(point)
        fits = {
            reward: overoptimization(rows, reward=reward)["fits"]
            for reward in ("gold_reward", "explicit_reward", "implicit_reward")
        }
        out[arm] = {"rows": rows, "fits": fits}
    return out


def hacking_rows(rows: Sequence[Row], sft: Sequence[Row], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Drift of a policy's texts against SFT's on the same prompts."""
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(row["prompt_id"] for row in sft))}

    def features(of: Sequence[Row]) -> dict[str, Any]:
        texts = [row["response"] for row in of]
        eos = [0.0 if row["truncated"] else 1.0 for row in of]
        return {**text_features(texts, eos=eos), "n_tokens": np.array([float(row["n_tokens"]) for row in of])}

    here, there = [index[row["prompt_id"]] for row in rows], [index[row["prompt_id"]] for row in sft]
    found = drift(features(rows), features(sft), here, prompt_index_sft=there, **options)
    if here == there:
        texts = ([row["response"] for row in rows], [row["response"] for row in sft])
        found += corpus_drift(*texts, here, confidence=options["confidence"], seed=options["seed"])
    return [dict(row) for row in found]


def _by_prompt(rewards: Sequence[Row]) -> tuple[list[Any], list[Any], list[Any], list[str]]:
    by_prompt = grouped(rewards, "prompt_id")
    columns = [
        [np.array([float(row[name]) for row in rows]) for rows in by_prompt.values()]
        for name in ("explicit_reward", "implicit_reward", "n_tokens")
    ]
    return columns[0], columns[1], columns[2], list(by_prompt)


def _on_samples(samples: Sequence[Row], options: Mapping[str, Any]) -> dict[str, Any]:
    """Explicit against implicit on what the policies wrote, all pairs of samples of a prompt; against gold where
    known."""
    sources = {
        "sft and base": ("base", "sft"),
        "PPO": ("rm_ppo",),
        "DPO": ("dpo",),
        "both arms": ("rm_ppo", "dpo"),
        "all": ("base", "sft", "rm_ppo", "dpo"),
    }
    drawn = [row for row in samples if row["kind"] != "best_of_n"]  # those are picked, and drawn before
    out: dict[str, Any] = {}
    for label, arms in sources.items():
        by_prompt = grouped([row for row in drawn if row["arm"] in arms], "prompt_id")
        usable = {prompt: rows for prompt, rows in by_prompt.items() if len(rows) > 1}
        if not usable:
            continue
        columns = {
            name: [[row[name] for row in rows] for rows in usable.values()]
            for name in ("explicit_reward", "implicit_reward", "gold_reward")
        }
        gold = [None if None in values else values for values in columns["gold_reward"]]
        explicit, implicit = columns["explicit_reward"], columns["implicit_reward"]
        out[label] = compare_on_samples(list(usable), explicit, implicit, gold, **options)
    return out


def verdict(win_rates: Sequence[Row]) -> dict[str, Any]:
    """One sentence on PPO against DPO: undecided where the interval holds one half, or where nobody neutral judged."""
    rows = [row for row in win_rates if (row["policy"], row["baseline"]) == ("rm_ppo", "dpo")]
    neutral = [row for row in rows if row["judge"] not in TRAINED_ON]
    if not rows:
        return {"winner": "undecided", "judge": None, "sentence": "Undecided: the two arms were not compared."}
    row = (neutral or rows)[0]
    facts = {
        key: row[key] for key in ("judge", "win_rate", "ci_low", "ci_high", "p_value", "n_judged", "prompts_needed")
    }
    if row["win_rate"] is None:
        return {**facts, "winner": "undecided", "sentence": f"Undecided: judge {row['judge']} judged no prompt."}
    behind = f"{_interval(row)}, {row['n_judged']} prompts, judge {row['judge']}"
    share = f"RM + PPO wins {row['win_rate']:.1%} against DPO ({behind})"
    if not neutral:
        signals = "; ".join(
            f"judge {r['judge']} is {TRAINED_ON[r['judge']]} and says {r['win_rate']:.1%}" for r in rows
        )
        return {
            **facts,
            "winner": "undecided",
            "sentence": f"Undecided: no independent judge looked at the two arms ({signals}). "
            "Name one in evaluate.judges.",
        }
    if row["ci_low"] is None or row["ci_low"] <= 0.5 <= row["ci_high"]:
        needed = row["prompts_needed"]
        more = f" To settle an effect of this size takes about {needed:,} prompts." if needed else ""
        return {**facts, "winner": "undecided", "sentence": f"Undecided: {share}; the interval holds one half.{more}"}
    winner, name = ("rm_ppo", "RM + PPO") if row["win_rate"] > 0.5 else ("dpo", "DPO")
    return {**facts, "winner": winner, "sentence": f"{name} is better on this data: {share}."}


def _interval(row: Row) -> str:
    if row["ci_low"] is None:
        return "no interval"
    return f"interval {row['ci_low']:.1%} to {row['ci_high']:.1%}"
