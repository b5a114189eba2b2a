"""Arms and judges whose numbers say nothing, whatever their win rate: a verdict must not rest on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from toolkit.evals.verdict import ARMS, NAMES
from toolkit.evals.words import counted, policy_name

Row = Mapping[str, Any]
# Above this KL per token the reference finds a policy's tokens exp(3) = 20 times less likely than the policy does, and
# each of them. Preference training on whole responses ends far below 1.
MOST_NATS_PER_TOKEN = 3.0
# A policy that ends fewer of its responses, where SFT ends this many, has lost the end of the text.
LEAST_ENDED, ENDED_BY_SFT = 0.02, 0.5
# This share of the responses is empty, the same, or one word over and over, and of SFT's it is not half as many.
MOST_ALIKE = 0.9
# Log-probabilities of two loads of equal weights differ by rounding.
UNMOVED_NATS = 1e-4
# The recipe's section of an arm, and its weight of the KL there.
SETTINGS = {"rm_ppo": ("ppo", "kl_coef"), "dpo": ("dpo", "beta")}
# Fewer prompts may be answered alike by chance, and fewer judgements be all ties.
LEAST_ROWS = 20
MOST_FAILED = 0.5


def broken_arms(policies: Sequence[Row], samples: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Arm -> what is wrong with its final policy, to be read behind its name.

    ``policies`` and ``samples`` (by policy) are the rows of the evaluation's tables.
    """
    reasons = {arm: _reason_of(arm, policies, samples) for arm in ARMS}
    return {arm: reason for arm, reason in reasons.items() if reason}


def last_sound_policies(
    broken: Iterable[str], policies: Sequence[Row], samples: Mapping[str, Sequence[Row]]
) -> dict[str, Row]:
    """Broken arm -> the row of its last policy along training that is not broken, where one was kept and sampled."""
    rows = {}
    for arm in broken:
        of_arm = [row for row in policies if row["arm"] == arm and row["kind"] in ("checkpoint", "round")]
        sound = [row for row in of_arm if not _reason_of(row["policy"], policies, samples)]
        if sound:
            rows[arm] = max(sound, key=lambda row: row["step"])
    return rows


def _reason_of(name: str, policies: Sequence[Row], samples: Mapping[str, Sequence[Row]]) -> str:
    rows = {row["policy"]: row for row in policies}
    if name not in rows or "sft" not in rows:
        return ""
    return _reason(rows[name], rows["sft"], samples[name], samples["sft"])


def _reason(policy: Row, sft: Row, samples: Sequence[Row], of_sft: Sequence[Row]) -> str:
    if garbage := _garbage(policy, sft, samples, of_sft):
        return garbage
    unmoved = samples and all(row["kl_nats"] is not None and abs(row["kl_nats"]) <= UNMOVED_NATS for row in samples)
    return "is SFT itself: training has changed none of the log-probabilities of its samples" if unmoved else ""


def _garbage(policy: Row, sft: Row, samples: Sequence[Row], of_sft: Sequence[Row]) -> str:
    ended, ended_by_sft = policy["eos_rate"]["value"], sft["eos_rate"]["value"]
    if ended is not None and ended <= LEAST_ENDED and ended_by_sft >= ENDED_BY_SFT:
        return f"ends {ended:.0%} of its responses, and SFT {ended_by_sft:.0%}: it has lost the end of a text"
    kl, length = policy["kl_nats"], policy["length_tokens"]["value"]
    if kl is not None and length and kl > MOST_NATS_PER_TOKEN * max(length, 1.0):
        return f"is {kl:,.4g} nats from SFT, {kl / length:,.3g} nats in each token: its texts are noise to SFT"
    for what, share in (("empty", _empty), ("the same text", _most_frequent), ("one word over and over", _one_word)):
        if len(samples) >= LEAST_ROWS and share(samples) >= MOST_ALIKE and share(of_sft) < MOST_ALIKE / 2:
            return f"has collapsed: {share(samples):.0%} of its responses are {what}"
    return ""


def broken_policy(samples: Sequence[Row], of_sft: Sequence[Row]) -> str:
    """What is wrong with a policy, to be read behind its name; "" where its samples are texts.

    Rows have ``response, truncated, kl_nats, n_tokens``. A policy that is SFT itself is none of these.
    """
    policy, sft = (
        {
            "eos_rate": {"value": fmean(not row["truncated"] for row in rows)},
            "kl_nats": fmean(row["kl_nats"] or 0.0 for row in rows),
            "length_tokens": {"value": fmean(row["n_tokens"] for row in rows)},
        }
        for rows in (samples, of_sft)
    )
    return _garbage(policy, sft, samples, of_sft)


def _empty(samples: Sequence[Row]) -> float:
    return sum(not row["response"].strip() for row in samples) / len(samples)


def _most_frequent(samples: Sequence[Row]) -> float:
    texts = [row["response"] for row in samples]
    return max(map(texts.count, set(texts))) / len(texts)


def _one_word(samples: Sequence[Row]) -> float:
    words = [row["response"].split() for row in samples]
    return sum(len(of_row) >= 4 and len(set(of_row)) == 1 for of_row in words) / len(words)


def constant_reward(scores: Sequence[float]) -> str:
    """What is wrong with an arm that was trained on a reward with these scores of held-out responses; "" if nothing."""
    if len(scores) < LEAST_ROWS or max(scores) - min(scores) > 1e-6 * max(1.0, max(map(abs, scores))):
        return ""
    return f"was trained on a constant: the reward model gives all {len(scores)} held-out responses the same score"


def broken_judge(preferences: Sequence[float | None], n_equal_texts: int) -> str:
    """Why a judge cannot decide, to be read behind its name; "" where it can.

    ``preferences`` are those of its comparisons of the arms, None where one failed; ``n_equal_texts`` of them are ties
    because both texts are equal.
    """
    failed = sum(preference is None for preference in preferences)
    if preferences and failed > MOST_FAILED * len(preferences):
        return f"a judge that failed in {failed:,} of {counted(len(preferences), 'comparison')} of the arms"
    ties = sum(preference == 0.5 for preference in preferences)
    if ties == len(preferences) - failed and ties - n_equal_texts >= LEAST_ROWS:
        return f"a judge that calls all {ties:,} comparisons of the arms a tie"
    return ""


def broken_arm_warnings(reasons: Mapping[str, str], sound: Mapping[str, Row]) -> list[str]:
    """A sentence for each broken arm: what is wrong, the likely setting, and its last policy of ``sound``."""
    out = []
    for arm, reason in reasons.items():
        section, weight = SETTINGS[arm]
        if "training has changed none" in reason:
            change = f"raise {section}.learning_rate, or train longer"
        elif "trained on a constant" in reason:
            change = "look at the reward model's data and training first"
        else:
            change = f"lower {section}.learning_rate or raise {section}.{weight}"
        warning = f"{NAMES[arm]} {reason}: no verdict rests on it; {change}"
        if arm in sound:
            row = sound[arm]
            warning += (
                f" ({policy_name(row['policy'])}, at {row['kl_nats']:.3g} nats, is the last one that is not broken)"
            )
        out.append(warning)
    return out
