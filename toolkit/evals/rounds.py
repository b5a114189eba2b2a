"""Rounds of sampling, labelling and training side by side: ``rounds`` of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evals.agreement import Comparison, EstimateDict, estimate_dict, pairwise_accuracy
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.verdict import ARMS, NAMES
from toolkit.evals.words import counted

Row = Mapping[str, Any]
# Of a row of ``policies``, what a round says about each arm.
POLICY_FIELDS = (
    "policy",
    "n_samples",
    "gold_reward",
    "explicit_reward",
    "kl_nats",
    "kl_standard_error",
    "kl_ci_low",
    "kl_ci_high",
    "length_tokens",
    "eos_rate",
)
RATE_FIELDS = ("win_rate", "standard_error", "ci_low", "ci_high", "n_prompts", "n_judged", "n_failed")
MOST_FAILED_LABELS = 0.05


def policy_of_round(arm: str, round_: int, last: int) -> str:
    """The name of an arm's policy at the end of a round; the last round's is the arm's.

    >>> policy_of_round("dpo", 1, 3), policy_of_round("dpo", 3, 3)
    ('dpo@round-1', 'dpo')
    """
    return arm if round_ == last else f"{arm}@round-{round_}"


@dataclass(frozen=True)
class FreshSamples:
    """An arm's labelled samples, and what its reward gave them before it was trained on them.

    ``comparisons`` are (prompt, i, j, p, weight) over the prompts of ``rewards``.
    """

    comparisons: Sequence[Comparison]
    rewards: Sequence[Sequence[float]]

    def accuracy(self, options: BootstrapOptions) -> EstimateDict:
        return estimate_dict(pairwise_accuracy(self.comparisons, self.rewards, **options))


def round_rows(
    policies: Sequence[Row],
    win_rates: Sequence[Row],
    labels: Mapping[int, Row],
    fresh: Mapping[int, Mapping[str, FreshSamples]],
    options: BootstrapOptions,
) -> list[dict[str, Any]]:
    """A row for each round, or none where there is one round alone.

    ``labels`` is what the stage of labels recorded, by round from 2 on. ``fresh`` has, by round and by arm, the samples
    that were labelled then, those of the policies before it. So ``fresh_accuracy`` of a round is that of its rewards
    (RM + PPO: the reward model's, DPO: the implicit one's) on samples of its policies, which only the next round
    labels. ``explicit_reward`` is the last reward model's in every round. ``labels_so_far`` counts the comparisons that
    were labelled for an arm until then, without those of the data.
    """
    if not labels:
        return []
    last, of_policy = max(labels), {row["policy"]: row for row in policies}
    rates = {(row["policy"], row["baseline"], row["judge"]): row for row in win_rates}
    judges = list(dict.fromkeys(row["judge"] for row in win_rates))

    def compared(policy: str, baseline: str) -> dict[str, dict[str, Any]]:
        found = {judge: rates.get((policy, baseline, judge)) for judge in judges}
        return {judge: {name: row[name] for name in RATE_FIELDS} for judge, row in found.items() if row is not None}

    rows, so_far = [], dict.fromkeys(ARMS, 0)
    for round_ in range(1, last + 1):
        names = {arm: policy_of_round(arm, round_, last) for arm in ARMS}
        entry: dict[str, Any] = {"round": round_, "judge": labels[round_]["judge"] if round_ in labels else None}
        for arm, name in names.items():
            of_labels = labels[round_]["arms"][arm] if round_ in labels else None
            so_far[arm] += of_labels["labels"] if of_labels is not None else 0
            entry[arm] = {
                **{field: of_policy[name][field] for field in POLICY_FIELDS},
                "win_rate_over_sft": compared(name, "sft"),
                "fresh_accuracy": fresh[round_ + 1][arm].accuracy(options) if round_ + 1 in fresh else None,
                "labels": of_labels,
                "labels_so_far": so_far[arm],
            }
        entry["rm_ppo_over_dpo"] = compared(*names.values())
        rows.append(entry)
    return rows


def round_warnings(rows: Sequence[Row], judges: Sequence[str]) -> list[str]:
    """What a reader must know of the rounds: a judge that labelled, and labels that failed."""
    labellers = {row["judge"] for row in rows} - {None, "gold"}
    out = [
        f"judge {judge} also labelled the samples of the rounds: both arms were trained on its preferences"
        for judge in judges
        if judge in labellers
    ]
    for arm in ARMS:
        of_arm = [row[arm]["labels"] for row in rows if row[arm]["labels"] is not None]
        asked, failed = (sum(labels[name] for labels in of_arm) for name in ("labels", "failed"))
        if failed > MOST_FAILED_LABELS * asked:
            out.append(f"{failed:,} of {counted(asked, 'label')} for {NAMES[arm]} failed: they are no comparisons")
    return out
