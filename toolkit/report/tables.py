"""The report's tables: numbers of ``results.json`` in the order and the words in which the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evals.hacking import FEATURE_NAMES
from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.evals.verdict import ALPHA
from toolkit.evals.words import on_fewer_prompts
from toolkit.report.names import ARM_NAMES, REWARDS, arm_of, policy_name
from toolkit.report.numbers import number
from toolkit.report.reading import ResultRow, Run, outdated
from toolkit.report.sheets import estimate_of

Estimate = Mapping[str, Any]
"""``{value, ci_low, ci_high, ...}``."""
# Features that are shares of one, and are shown in percent.
SHARES = {"eos", "repetition", "distinct_1", "distinct_2", "distinct_3", "list_density"} | {
    f"corpus_distinct_{n}" for n in (1, 2, 3)
}


# ---------------------------------------------------------------- verdict and win rates


@dataclass(frozen=True)
class WinRateRow:
    """A row of ``win_rates`` with the names that are shown.

    It is sure where its judge may decide, its interval leaves out one half, and so does its permutation test, corrected
    for the number of rows (Holm). The row that the verdict rests on is one planned comparison without a correction.
    ``signal`` says which training signal the judge is, and is empty for a neutral one. ``test`` is the judge's test on
    held-out labels, where there was one.
    """

    rate: ResultRow
    name: str
    against: str
    arm: str
    checkpoint: bool
    signal: str
    sure: bool
    lc_sure: bool
    test: ResultRow | None


@dataclass(frozen=True)
class Verdict:
    """The sentence in two parts, each judge's row of the two arms, and the sections that changed since.

    ``cost`` is what the arms took, ``next_step`` what to do next; both are empty where the run does not say. ``ended``
    has each judge's row on the pairs in which both arms ended their responses.
    """

    headline: str
    rest: str
    winner: str
    cost: str
    next_step: str
    judges: list[WinRateRow]
    ended: dict[str, ResultRow]
    changed: list[str]


def verdict(run: Run) -> Verdict:
    result = run.results["verdict"]
    headline, _, rest = str(result["sentence"]).partition(": ")
    return Verdict(
        headline=headline,
        rest=rest[:1].upper() + rest[1:],
        winner=result["winner"],
        cost=(run.results.get("cost") or {}).get("sentence", ""),
        next_step=result.get("next_step", ""),
        judges=[row for row in win_rates(run) if _between_arms(row.rate)],
        ended={row["judge"]: row for row in result.get("both_ended", [])},
        changed=outdated(run),
    )


def warnings(run: Run) -> list[str]:
    """The warnings of a run, without the arms' differences, which have a table."""
    of_arms = {row["sentence"] for row in run.results.get("arm_differences", [])}
    return [text for text in run.results["warnings"] if text not in of_arms]


def _between_arms(row: ResultRow) -> bool:
    return (row["policy"], row["baseline"]) == ("rm_ppo", "dpo")


def _pooled(result: Mapping[str, Any], rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The row of all judges together, where the verdict rests on it: it is no row of ``win_rates``.

    What the verdict does not have of it, such as how many judgements failed, is None.
    """
    if not rows or result.get("judge") is None or any(row["judge"] == result["judge"] for row in rows):
        return []
    numbers = {name: value for name, value in result.items() if name in rows[0]}
    arms = {"policy": "rm_ppo", "baseline": "dpo"}
    return [dict.fromkeys(rows[0]) | numbers | arms]


def _judges_that_may_not_decide(run: Run) -> set[str]:
    """Judges that failed their test, were trained on, or compared the arms and are not independent."""
    failed = {test["judge"] for test in run.results.get("judge_tests", []) if test["passed"] is False}
    result = run.results.get("verdict", {})
    refused = failed | set(TRAINING_SIGNALS)
    if "judges" not in result:  # a run of an earlier duel
        return refused
    compared = {row["judge"] for row in run.results["win_rates"] if _between_arms(row)}
    return refused | (compared - set(result["judges"]))


def win_rates(run: Run) -> list[WinRateRow]:
    """Every row: the arms against each other first, then final policies, then checkpoints, by judge.

    The row of all judges together follows those of the judges, where the verdict rests on it.
    """
    # a run that is still going has neither
    result, recorded = run.results.get("verdict", {}), run.results["win_rates"]
    tests = {test["judge"]: test for test in run.results.get("judge_tests", [])}
    undecisive = _judges_that_may_not_decide(run)

    def shown(rate: ResultRow) -> WinRateRow:
        planned = _between_arms(rate) and rate["judge"] == result.get("judge")
        p_value = rate["p_value"] if planned or rate["holm_p"] is None else rate["holm_p"]
        tested = rate["judge"] not in undecisive and p_value is not None and p_value <= ALPHA
        sure = tested and _leaves_out_half(rate["ci_low"], rate["ci_high"])
        return WinRateRow(
            rate=rate,
            name=policy_name(rate["policy"]),
            against=policy_name(rate["baseline"]),
            arm=arm_of(rate["policy"]),
            checkpoint="@" in rate["policy"],
            signal=TRAINING_SIGNALS.get(rate["judge"], ""),
            sure=sure,
            # no test goes with the rate at equal length: it is what remains of a rate that is sure
            lc_sure=sure and _leaves_out_half(rate["lc_ci_low"], rate["lc_ci_high"]),
            test=tests.get(rate["judge"]),
        )

    rows = [shown(row) for row in [*recorded, *_pooled(result, recorded)]]
    order = {"rm_ppo": 0, "dpo": 1}
    judges = list(dict.fromkeys(row.rate["judge"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            row.rate["baseline"] != "dpo",
            row.checkpoint,
            judges.index(row.rate["judge"]),
            order.get(row.arm, 2),
        ),
    )


def _leaves_out_half(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and not low <= 0.5 <= high


# ---------------------------------------------------------------- policies and rewards


@dataclass(frozen=True)
class PolicyRow:
    """A row of ``policies`` with its name and colour."""

    row: ResultRow
    name: str
    color: str
    kind: str


@dataclass(frozen=True)
class PolicyTable:
    """``rewards`` are the columns of rewards, (key, label). A reward that no policy has is left out.

    ``note`` says why a policy lacks a reward that others have, ``fewer`` that checkpoints have fewer prompts.
    """

    rewards: list[tuple[str, str]]
    rows: list[PolicyRow]
    note: str
    fewer: str


def policies(run: Run) -> PolicyTable:
    rows = run.results["policies"]
    reason = next((reason for row in rows if (reason := row.get("implicit_reward_reason"))), "")
    return PolicyTable(
        [(key, label) for key, label in REWARDS.items() if any(r[key]["value"] is not None for r in rows)],
        [PolicyRow(row, policy_name(row["policy"]), arm_of(row["policy"]), row["kind"]) for row in rows],
        f"{reason[:1].upper()}{reason[1:]}." if reason else "",
        on_fewer_prompts([row for row in rows if row["kind"] != "base"]),  # the base policy is in no figure
    )


def peaks(run: Run) -> list[str]:
    """Where the curve of Gao et al. puts the best KL of each arm, and why there is no curve for others, in words."""
    sentences = []
    without: dict[str, dict[str, list[str]]] = {}
    for arm, part in run.results.get("overoptimization", {}).items():
        for reward, by_kind in part.get("fits", {}).items():
            label = f"{ARM_NAMES[arm]}, {REWARDS[reward]}"
            fit, reason = (by_kind or {}).get("rl"), (by_kind or {}).get("reason")
            if fit:
                sentences.append(f"{label}: {_peak(fit, max(row['kl_nats'] for row in part['rows']))}")
            elif reason and any(row[reward] is not None for row in part["rows"]):
                without.setdefault(reason, {}).setdefault(ARM_NAMES[arm], []).append(REWARDS[reward])
    for reason, by_arm in without.items():
        arms = " or ".join(f"{arm} ({', '.join(rewards)})" for arm, rewards in by_arm.items())
        sentences.append(f"No curve is fitted to {arms}: {reason}.")
    return sentences


def _peak(fit: Mapping[str, Any], reach: float) -> str:
    """``reach`` is the largest KL of the arm."""
    peak, low, high = fit["peak_kl_nats"], fit.get("peak_kl_nats_ci_low"), fit.get("peak_kl_nats_ci_high")
    between = "" if low is None else f" (interval from {number(low, 2)} to {number(high, 2, absent='no bound')})"
    if peak is None:
        below = fit["a"] < fit["b"] * math.log(reach) / 2  # the sign of d(a - b ln d) there
        at_end = f": it is below SFT at {number(reach, 2)} nats, where the arm ends" if below else ""
        return f"the fitted curve has no peak{between}{at_end}."
    if peak <= reach and fit["a"] <= 0.0:
        return (
            f"the reward falls almost from the start: the fitted curve peaks at {number(peak, 2)} nats{between}, "
            f"and the arm went to {number(reach, 2)}."
        )
    if peak <= reach:
        return f"the fitted curve peaks at {number(peak, 2)} nats{between}, and the arm went to {number(reach, 2)}."
    return f"the fitted curve still rises at {number(reach, 2)} nats, where the arm ends{between}."


@dataclass(frozen=True)
class EstimateRow:
    """One measure in each column of a table. ``percent``: it is a share of one."""

    label: str
    percent: bool
    cells: list[Estimate | None]


@dataclass(frozen=True)
class EstimateTable:
    """``sizes`` are the numbers of prompts and of pairs, for each column or for all of them together."""

    columns: list[str]
    rows: list[EstimateRow]
    sizes: list[tuple[int, int]]
    warning: str = ""


AGREEMENT = (
    ("label_ceiling", "best accuracy that the labels allow", True),
    ("accuracy_explicit", "accuracy of the explicit reward", True),
    ("accuracy_implicit", "accuracy of the implicit reward", True),
    ("agreement", "pairs that both order alike", True),
    ("cohen_kappa", "the same, corrected for chance (κ)", False),
    ("spearman", "rank correlation within prompts (Spearman)", False),
    ("kendall", "rank correlation within prompts (Kendall)", False),
    ("margin_correlation", "correlation of margins", False),
    ("margin_slope", "slope of implicit on explicit margins", False),
)
QUALITY = (
    ("accuracy", "accuracy on the labels", True),
    ("accuracy_against_gold", "accuracy against gold", True),
    ("nll", "log loss, nats", False),
    ("brier", "Brier score", False),
    ("ece", "expected calibration error", True),
    ("temperature", "temperature that calibrates it best", False),
    ("margin_mean", "mean margin of the preferred response", False),
    ("accuracy_preferred_longer", "accuracy where the longer one is preferred", True),
    ("accuracy_preferred_shorter", "accuracy where the shorter one is preferred", True),
    ("longer_preferred_rate", "labels that prefer the longer one", True),
    ("length_spearman", "rank correlation of reward and length", False),
)


# Whose samples, for readers: the names of ``implicit_vs_explicit.on_samples`` where they differ.
SAMPLED = {"sft and base": "SFT and base", "PPO": "RM + PPO"}


def agreement(run: Run) -> EstimateTable | None:
    """Explicit and implicit reward on held-out data and on the samples of the policies, one column each."""
    checks = run.results.get("implicit_vs_explicit")
    if not checks:
        return None
    ceiling = references(run.results).get("label_ceiling") or {}
    columns = {"held-out responses": {**checks["held_out"], "label_ceiling": ceiling.get("accuracy")}} | {
        f"samples of {SAMPLED.get(name, name)}" if name != "all" else "all samples": part
        for name, part in checks["on_samples"].items()
    }
    sizes = [(part["n_prompts"], part["n_pairs"]) for part in columns.values()]
    rows = _estimate_rows(AGREEMENT, list(columns.values()))
    return EstimateTable(list(columns), rows, sizes, checks["warning"])


def quality(run: Run) -> EstimateTable | None:
    """Accuracy, calibration and length bias of both rewards on held-out comparisons, beside what they compare with."""
    by_reward = {name: part for name, part in run.results.get("rm_quality", {}).items() if part}
    if not by_reward:
        return None
    parts = list(by_reward.values())
    sizes = [(parts[0]["n_prompts"], parts[0]["n_pairs"])]
    columns = [f"{name} reward" for name in by_reward]
    known = references(run.results)
    for key, label in (("label_ceiling", "best on these labels"), ("coin", "a coin")):
        if known.get(key):
            columns.append(label)
            parts.append(known[key])
    reason = known.get("label_ceiling_reason")
    return EstimateTable(
        columns,
        _estimate_rows(QUALITY, parts),
        sizes,
        f"The best on these labels is not shown: {reason}." if reason else "",
    )


def references(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a coin and what the labels themselves get on the held-out comparisons. Empty in runs of an earlier duel."""
    return (results.get("rm_quality", {}).get("explicit") or {}).get("references") or {}


def _estimate_rows(measures: Sequence[tuple[str, str, bool]], parts: Sequence[Mapping[str, Any]]) -> list[EstimateRow]:
    """A row for each measure that some part has."""
    rows = [
        EstimateRow(label, in_percent, [estimate_of(part.get(key)) for part in parts])
        for key, label, in_percent in measures
    ]
    return [row for row in rows if any(cell is not None and cell["value"] is not None for cell in row.cells)]


# ---------------------------------------------------------------- drift


@dataclass(frozen=True)
class DriftColumn:
    name: str
    color: str


@dataclass(frozen=True)
class DriftFeature:
    """The value of SFT, and for each column its difference from SFT, None where the policy lacks the feature.

    ``sft`` has the lowest and the highest value beside a policy: what is compared at equal numbers of words depends on
    the lengths of both.
    """

    label: str
    percent: bool
    sft: tuple[float, float]
    cells: list[Mapping[str, Any] | None]


@dataclass(frozen=True)
class DriftTable:
    columns: list[DriftColumn]
    rows: list[DriftFeature]


def drift(run: Run) -> DriftTable | None:
    """Difference from SFT of each text feature, a column for each policy."""
    by_policy = {
        policy: {row["feature"]: row for row in rows}
        for policy, rows in run.results.get("hacking", {}).items()
        if policy != "sft" and rows
    }
    if not by_policy:
        return None
    features = [f for f in FEATURE_NAMES if any(f in rows for rows in by_policy.values())]
    features += sorted({f for rows in by_policy.values() for f in rows} - set(FEATURE_NAMES))
    names = sorted(by_policy, key=lambda name: ({"rm_ppo": 0, "dpo": 1}.get(name, 2), name))
    rows = []
    for feature in features:
        cells = [by_policy[name].get(feature) for name in names]
        sft = [cell["sft"] for cell in cells if cell is not None]
        label = FEATURE_NAMES.get(feature, feature)
        rows.append(DriftFeature(label, feature in SHARES, (min(sft), max(sft)), cells))
    return DriftTable([DriftColumn(policy_name(name), arm_of(name)) for name in names], rows)
