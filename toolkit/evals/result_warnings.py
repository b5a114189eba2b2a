"""What a reader must know before believing an evaluation: one sentence each, all in one place.

They stand in ``warnings`` of ``evaluation.json`` and beside the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.evals.hacking import FEATURE_NAMES, DriftRow
from toolkit.evals.intervals import BootstrapOptions, bootstrap_mean
from toolkit.evals.judge_tests import JudgeTest
from toolkit.evals.overoptimization import STILL_NATS
from toolkit.evals.training_signals import is_neutral
from toolkit.evals.verdict import NAMES
from toolkit.evals.winrate import average_within_prompt
from toolkit.evals.words import counted, policy_name

Row = Mapping[str, Any]
MOST_FAILURES = 0.05
LEAST_CONSISTENCY = 0.6  # GPT-4 answered 65% of pairs alike in both orders (Zheng et al. 2023, arXiv 2306.05685)


def result_warnings(
    *,
    policies: Sequence[Row],
    samples: Mapping[str, Sequence[Row]],
    win_rates: Sequence[Row],
    rm_quality: Mapping[str, Row],
    tests: Mapping[str, JudgeTest],
    hacking: Mapping[str, Sequence[DriftRow]],
    options: BootstrapOptions,
) -> list[str]:
    """All warnings of an evaluation. ``samples`` are the rows of ``samples.parquet`` by policy."""
    return [
        *rewards_at_chance(rm_quality),
        *arms_that_did_not_move(policies, samples, options),
        *judges_that_failed_their_test(tests),
        *places_instead_of_preferences(win_rates, tests),
        *length_turns_the_result(win_rates),
        *changed_texts(hacking),
    ]


def rewards_at_chance(rm_quality: Mapping[str, Row]) -> list[str]:
    names = {"explicit": "the reward model", "implicit": "DPO's implicit reward"}
    out = []
    for kind, name in names.items():
        accuracy = rm_quality[kind]["accuracy"]
        low, high = accuracy["ci_low"], accuracy["ci_high"]
        if accuracy["value"] is None or (low is not None and low > 0.5) or (low is None and accuracy["value"] > 0.5):
            continue
        bounds = "" if low is None else f", interval {low:.1%} to {high:.1%}"
        than = "worse than" if high is not None and high < 0.5 else "no better than"
        out.append(f"{name} is {than} a coin on held-out comparisons (accuracy {accuracy['value']:.1%}{bounds})")
    return out


def arms_that_did_not_move(
    policies: Sequence[Row], samples: Mapping[str, Sequence[Row]], options: BootstrapOptions
) -> list[str]:
    """Arms whose KL and whose rewards are within their errors of SFT's.

    DPO's implicit reward does not count for DPO: on its samples it is the KL again.
    """
    out = []
    for row in policies:
        if row["policy"] not in NAMES or row["kl_nats"] is None:
            continue
        far = row["kl_nats"] > STILL_NATS and (row["kl_ci_low"] is None or row["kl_ci_low"] > 0.0)
        rewards = [name for name in ("gold_reward", "explicit_reward") if row[name]["value"] is not None]
        if far or any(_differs(samples[row["policy"]], samples["sft"], name, options) for name in rewards):
            continue
        out.append(
            f"{NAMES[row['policy']]} did not move: its KL from SFT is {row['kl_nats']:.3f} nats per response, and "
            "its rewards are within their errors of SFT's"
        )
    return out


def _differs(policy: Sequence[Row], sft: Sequence[Row], reward: str, options: BootstrapOptions) -> bool:
    """Whether the interval of the mean difference on the same prompts leaves out 0."""
    means = []
    for rows in (policy, sft):
        prompts, values = average_within_prompt([row["prompt_id"] for row in rows], [row[reward] for row in rows])
        means.append(dict(zip(prompts.tolist(), values.tolist(), strict=True)))
    difference = [means[0][prompt] - means[1][prompt] for prompt in means[0].keys() & means[1].keys()]
    estimate = bootstrap_mean(sorted(difference), **options)
    low, high = estimate.ci_low, estimate.ci_high
    if low is None or high is None:
        return bool(estimate.value)
    return low > 0.0 or high < 0.0


def judges_that_failed_their_test(tests: Mapping[str, JudgeTest]) -> list[str]:
    """The training signals are named as rewards already (:func:`rewards_at_chance`)."""
    out = []
    for judge, test in tests.items():
        if not is_neutral(judge) or test.passed:
            continue
        if test.passed is None:
            out.append(f"judge {judge} was not tested on held-out labels: {test.reason}")
        else:
            out.append(f"judge {judge} does not decide: it is {test.reason}")
    return out


def failing_judge(judge: str, n_failed: int, n_judgements: int) -> list[str]:
    """A warning where more than a few of a judge's judgements failed."""
    share = n_failed / n_judgements
    if share <= MOST_FAILURES:
        return []
    return [f"judge {judge} failed in {n_failed:,} of {counted(n_judgements, 'judgement')} ({share:.1%})"]


def places_instead_of_preferences(win_rates: Sequence[Row], tests: Mapping[str, JudgeTest]) -> list[str]:
    """Judges whose answer depends on which response they are shown first."""
    shares: dict[str, dict[str, float]] = {}
    for judge, test in tests.items():
        if test.position_consistency["value"] is not None:
            shares.setdefault(judge, {})["held-out pairs"] = float(test.position_consistency["value"])
    for row in win_rates:
        if {row["policy"], row["baseline"]} == set(NAMES) and row["position_consistency"] is not None:
            shares.setdefault(row["judge"], {})["comparisons of the arms"] = float(row["position_consistency"])
    out = []
    for judge, of_judge in shares.items():
        low = [f"{value:.1%} of the {where}" for where, value in of_judge.items() if value < LEAST_CONSISTENCY]
        if low:
            out.append(f"judge {judge} answers alike in both orders on only {' and '.join(low)}")
    return out


def length_turns_the_result(win_rates: Sequence[Row]) -> list[str]:
    """Final policies that win as they are and lose at equal length, or the other way round."""
    out = []
    for row in win_rates:
        raw, controlled = row["win_rate"], row["lc_win_rate"]
        if row["policy"] not in NAMES or raw is None or controlled is None:
            continue
        if (raw - 0.5) * (controlled - 0.5) < 0.0:
            out.append(
                f"{NAMES[row['policy']]} wins {raw:.1%} against {policy_name(row['baseline'])} "
                f"by judge {row['judge']}, and {controlled:.1%} at equal length: the two disagree on who is ahead"
            )
    return out


def milestones_not_reached(missed: Mapping[str, Sequence[float]], kl_nats: Mapping[str, float | None]) -> list[str]:
    """The KL milestones that an arm's training never reached. ``kl_nats`` are the KLs of the policies at the end."""
    out = []
    for arm, milestones in missed.items():
        if milestones:
            kl = kl_nats.get(arm)
            end = "" if kl is None else f": its last policy is {kl:.2f} nats from SFT"
            values = ", ".join(f"{milestone:g}" for milestone in milestones)
            out.append(f"no policy of {NAMES[arm]} is kept for KL {values}, which its training did not reach{end}")
    return out


def changed_texts(hacking: Mapping[str, Sequence[DriftRow]]) -> list[str]:
    """One sentence for each policy whose texts changed."""
    flagged = {policy: [row["feature"] for row in rows if row["flagged"]] for policy, rows in hacking.items()}
    return [
        f"the responses of {policy_name(policy)} differ from those of SFT: "
        + ", ".join(FEATURE_NAMES.get(feature, feature) for feature in features)
        for policy, features in flagged.items()
        if features
    ]
