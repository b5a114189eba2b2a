"""The statistics of an evaluation, each number with its interval: ``results.json`` without the recipe and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from toolkit.evals.agreement import (
    LOG_Z_WARNING,
    Comparison,
    compare_on_samples,
    compare_rewards,
    comparisons_by_reward,
    decided,
    estimate_dict,
    pairwise_accuracy,
)
from toolkit.evals.best_of_n import best_of_n_kl
from toolkit.evals.broken import broken_arm_warnings, broken_arms, last_sound_policies
from toolkit.evals.hacking import DriftRow, corpus_drift, drift, text_features, words_beside
from toolkit.evals.intervals import NO_ESTIMATE, BootstrapOptions, bootstrap_mean
from toolkit.evals.overoptimization import fit_with_intervals
from toolkit.evals.result_warnings import result_warnings
from toolkit.evals.rm_quality import rm_quality
from toolkit.evals.verdict import BY_DEFAULT, Judging, verdict
from toolkit.evals.winrate import average_within_prompt

TableRow = Mapping[str, Any]
"""A row of one of the evaluation's tables, by column."""
REWARDS = ("gold_reward", "explicit_reward", "implicit_reward")
ITS_KL_AGAIN = "on DPO's own samples its implicit reward is beta times their KL from SFT, by definition: no evidence"


def summarise(
    samples: Sequence[TableRow],
    rewards: Sequence[TableRow],
    win_rates: Sequence[TableRow],
    comparisons: Sequence[Comparison],
    *,
    best_of_n: int,
    options: BootstrapOptions,
    judging: Judging = BY_DEFAULT,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """``evaluation.json``: ``results.json`` without ``schema_version``, ``recipe`` and ``cost``.

    ``samples``, ``rewards`` and ``win_rates`` are the rows of these tables. ``comparisons`` are the held-out ones as
    (prompt, i, j, p, weight), over the prompts of ``rewards`` in their order. ``warnings`` come before those of
    :func:`result_warnings`.
    """
    by_policy = grouped(samples, "policy")
    policies = [policy_row(name, rows, best_of_n, options) for name, rows in by_policy.items()]
    explicit, implicit, lengths, prompt_ids = _by_prompt(rewards)
    gold = gold_by_prompt(rewards)
    hacking = {
        name: hacking_rows(rows, by_policy["sft"], options)
        for name, rows in by_policy.items()
        if rows[0]["kind"] in ("final", "best_of_n")
    }
    quality: dict[str, dict[str, Any]] = {
        "explicit": rm_quality(comparisons, explicit, lengths=lengths, **options),
        "implicit": rm_quality(comparisons, implicit, lengths=lengths, **options),
    }
    if gold is not None:
        by_gold = decided(comparisons_by_reward(comparisons, gold))  # of a tie no order is right
        for part, values in ((quality["explicit"], explicit), (quality["implicit"], implicit)):
            part["accuracy_against_gold"] = estimate_dict(pairwise_accuracy(by_gold, values, **options))
        quality["gold"] = {"accuracy": estimate_dict(pairwise_accuracy(comparisons, gold, **options))}
    judging = replace(judging, broken_arms={**broken_arms(policies, by_policy), **judging.broken_arms})
    sound = last_sound_policies(judging.broken_arms, policies, by_policy)
    further_warnings = result_warnings(
        policies=policies,
        samples=by_policy,
        win_rates=win_rates,
        rm_quality=quality,
        tests=judging.tests,
        hacking=hacking,
        options=options,
    )
    return {
        "verdict": verdict(win_rates, judging, kl_nats={row["policy"]: row["kl_nats"] for row in policies}),
        "policies": policies,
        "win_rates": [dict(row) for row in win_rates],
        "implicit_vs_explicit": {
            "held_out": compare_rewards(prompt_ids, comparisons, explicit, implicit, **options),
            "on_samples": _on_samples(samples, options),
            "warning": LOG_Z_WARNING,
        },
        "frontier": frontier_rows(policies, win_rates),
        "overoptimization": overoptimization_by_arm(policies, by_policy, options),
        "hacking": hacking,
        "rm_quality": quality,
        "judge_tests": [asdict(test) for test in judging.tests.values()],
        "warnings": [*broken_arm_warnings(judging.broken_arms, sound), *warnings, *further_warnings],
    }


def grouped(rows: Sequence[TableRow], column: str) -> dict[str, list[TableRow]]:
    """Rows by the value of a column, in order of first appearance."""
    out: dict[str, list[TableRow]] = {}
    for row in rows:
        out.setdefault(row[column], []).append(row)
    return out


def mean_of(rows: Sequence[TableRow], column: str, options: BootstrapOptions) -> dict[str, float | int | None]:
    """Mean over prompts of a column, the samples of a prompt averaged first. All None where the column has a None."""
    if any(row.get(column) is None for row in rows):
        return NO_ESTIMATE.as_dict()
    _, means = average_within_prompt([row["prompt_id"] for row in rows], [float(row[column]) for row in rows])
    return bootstrap_mean(means, **options).as_dict()


def policy_row(name: str, rows: Sequence[TableRow], best_of_n: int, options: BootstrapOptions) -> dict[str, Any]:
    """One policy: rewards, KL to SFT (nats per response), length, and the share that ends by itself."""
    first = rows[0]
    kl = mean_of(rows, "kl_nats", options)
    if first["kind"] == "best_of_n":
        # Selection changes the distribution but not the log-probabilities: the known bound replaces the estimate.
        kl = {"value": best_of_n_kl(best_of_n), "standard_error": None, "ci_low": None, "ci_high": None, "n": kl["n"]}
    elif first["kind"] == "sft":
        kl = {"value": 0.0, "standard_error": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n": kl["n"]}
    by_definition = first["arm"] == "dpo"
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
        "implicit_reward": NO_ESTIMATE.as_dict() if by_definition else mean_of(rows, "implicit_reward", options),
        "implicit_reward_reason": ITS_KL_AGAIN if by_definition else None,
        "reward_disagreement": mean_of(rows, "reward_disagreement", options),
        "kl_nats": kl["value"],
        "kl_standard_error": kl["standard_error"],
        "kl_ci_low": kl["ci_low"],
        "kl_ci_high": kl["ci_high"],
        "length_tokens": mean_of(rows, "n_tokens", options),
        "eos_rate": mean_of(ended, "ended", options),
    }


def frontier_rows(policies: Sequence[TableRow], win_rates: Sequence[TableRow]) -> list[dict[str, Any]]:
    """Rewards and win rates against KL: SFT, both arms with their checkpoints, and best-of-n.

    DPO is not judged by its own implicit reward, which is its KL again.
    """
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
                    if name == row["policy"] and (row["arm"], judge) != ("dpo", "implicit")
                },
            }
        )
    return out


def overoptimization_by_arm(
    policies: Sequence[TableRow], samples: Mapping[str, Sequence[TableRow]], options: BootstrapOptions
) -> dict[str, Any]:
    """The rewards above those of SFT by checkpoint against sqrt(KL), with the fit of Gao et al. for each arm.

    ``fits`` has for each reward ``rl``, the fit, or None with a ``reason``.
    """
    start = next(row["policy"] for row in policies if row["kind"] == "sft")
    out: dict[str, Any] = {}
    for arm in ("rm_ppo", "dpo"):
        trained = [row for row in policies if row["arm"] == arm]
        rows = []
        for row in trained:
            kl = max(row["kl_nats"], 0.0)  # an estimate near 0 may fall below it
            point: dict[str, Any] = {"policy": row["policy"], "step": row["step"], "kind": "rl", "kl_nats": kl}
            point["sqrt_kl"] = math.sqrt(kl)
            for reward in REWARDS:
                gains = _gains_by_prompt(samples[row["policy"]], samples[start], reward)
                if gains is None or row[reward]["value"] is None:  # DPO's implicit reward is its KL
                    point[reward] = None
                else:
                    point[reward] = float(np.mean([*gains.values()]))
            rows.append(point)
        names = [row["policy"] for row in trained]
        fits = {reward: _fit(names, start, samples, reward, options) for reward in REWARDS}
        if arm == "dpo":
            fits["implicit_reward"] = {"rl": None, "reason": ITS_KL_AGAIN}
        out[arm] = {"rows": rows, "fits": fits}
    return out


def _fit(
    policies: Sequence[str], sft: str, samples: Mapping[str, Sequence[TableRow]], reward: str, options: BootstrapOptions
) -> dict[str, Any]:
    """The fit over the prompts that all of these policies were sampled on."""
    if not policies:
        return {"rl": None, "reason": "no policy was evaluated"}
    gains = [_gains_by_prompt(samples[name], samples[sft], reward) for name in policies]
    known = [of_policy for of_policy in gains if of_policy is not None]
    if len(known) < len(policies):
        return {"rl": None, "reason": "the reward is not known"}
    prompts = sorted(set.intersection(*(set(of_policy) for of_policy in known)))
    kl = [_means_by_prompt(samples[name], "kl_nats") for name in policies]
    kl_PN = np.array([[of_policy[prompt] for prompt in prompts] for of_policy in kl])
    gain_PN = np.array([[of_policy[prompt] for prompt in prompts] for of_policy in known])
    fit, reason = fit_with_intervals(kl_PN, gain_PN, kind="rl", **options)
    return {"rl": fit, "reason": reason}


def _gains_by_prompt(rows: Sequence[TableRow], sft: Sequence[TableRow], reward: str) -> dict[str, float] | None:
    """How much more of a reward a policy has than SFT, by each prompt of the policy. None where it is not known."""
    if any(row[reward] is None for of_policy in (rows, sft) for row in of_policy):
        return None
    start = _means_by_prompt(sft, reward)
    return {prompt: value - start[prompt] for prompt, value in _means_by_prompt(rows, reward).items()}


def _means_by_prompt(rows: Sequence[TableRow], column: str) -> dict[str, float]:
    """The mean of a prompt's samples, by prompt in order of the ids."""
    prompts, means = average_within_prompt([row["prompt_id"] for row in rows], [float(row[column]) for row in rows])
    return dict(sorted(zip(prompts.tolist(), means.tolist(), strict=True)))


def hacking_rows(rows: Sequence[TableRow], sft: Sequence[TableRow], options: BootstrapOptions) -> list[DriftRow]:
    """Drift of a policy's texts from those of SFT on the same prompts."""
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(row["prompt_id"] for row in sft))}

    prompts, prompts_sft = [index[row["prompt_id"]] for row in rows], [index[row["prompt_id"]] for row in sft]
    texts, texts_sft = [row["response"] for row in rows], [row["response"] for row in sft]

    def features(of: Sequence[TableRow], texts: Sequence[str], beside: Sequence[Sequence[int]]) -> dict[str, Any]:
        eos = [0.0 if row["truncated"] else 1.0 for row in of]
        n_tokens = np.array([float(row["n_tokens"]) for row in of])
        return {**text_features(texts, beside, eos=eos), "n_tokens": n_tokens}

    changes = drift(
        features(rows, texts, words_beside(prompts, texts_sft, prompts_sft)),
        features(sft, texts_sft, words_beside(prompts_sft, texts, prompts)),
        prompts,
        prompt_index_sft=prompts_sft,
        **options,
    )
    if prompts == prompts_sft:
        changes += corpus_drift(texts, texts_sft, prompts, confidence=options["confidence"], seed=options["seed"])
    return changes


def _by_prompt(rewards: Sequence[TableRow]) -> tuple[list[Any], list[Any], list[Any], list[str]]:
    by_prompt = grouped(rewards, "prompt_id")
    columns = [
        [np.array([float(row[name]) for row in rows]) for rows in by_prompt.values()]
        for name in ("explicit_reward", "implicit_reward", "n_tokens")
    ]
    return columns[0], columns[1], columns[2], list(by_prompt)


def gold_by_prompt(rewards: Sequence[TableRow]) -> list[Any] | None:
    """The gold rewards of each prompt's held-out responses; None where one is not known."""
    if any(row["gold_reward"] is None for row in rewards):
        return None
    return [np.array([float(row["gold_reward"]) for row in of]) for of in grouped(rewards, "prompt_id").values()]


def _on_samples(samples: Sequence[TableRow], options: BootstrapOptions) -> dict[str, Any]:
    """Explicit against implicit reward on all pairs of samples of a prompt, and both against gold where it is known."""
    arms_of = {
        "sft and base": ("base", "sft"),
        "PPO": ("rm_ppo",),
        "DPO": ("dpo",),
        "both arms": ("rm_ppo", "dpo"),
        "all": ("base", "sft", "rm_ppo", "dpo"),
    }
    drawn = [row for row in samples if row["kind"] != "best_of_n"]  # best-of-n is a selection of other samples
    out: dict[str, Any] = {}
    for label, arms in arms_of.items():
        by_prompt = grouped([row for row in drawn if row["arm"] in arms], "prompt_id")
        usable = {prompt: rows for prompt, rows in by_prompt.items() if len(rows) > 1}
        if not usable:
            continue
        columns = {
            name: [[row[name] for row in rows] for rows in usable.values()]
            for name in ("response", "explicit_reward", "implicit_reward", "gold_reward")
        }
        gold = [None if None in values else values for values in columns["gold_reward"]]
        texts, explicit, implicit = (columns[name] for name in ("response", "explicit_reward", "implicit_reward"))
        out[label] = compare_on_samples(list(usable), texts, explicit, implicit, gold, **options)
    return out
