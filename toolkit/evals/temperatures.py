"""The arms at several sampling temperatures side by side, and whether their order depends on the temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.summary import grouped, policy_row
from toolkit.evals.verdict import ARMS, NAMES
from toolkit.evals.winrate import holm

Row = Mapping[str, Any]
COMPARED = ("sft", *ARMS)
# Of a row of ``policies``: what is known of a policy at every temperature.
POLICY_FIELDS = (
    "policy",
    "n_samples",
    "gold_reward",
    "kl_nats",
    "kl_standard_error",
    "kl_ci_low",
    "kl_ci_high",
    "length_tokens",
    "eos_rate",
)


def temperature_entry(
    temperature: float, samples: Sequence[Row], win_rates: Sequence[Row], options: BootstrapOptions
) -> dict[str, Any]:
    """An entry of ``temperatures``: SFT and both arms at one temperature.

    ``samples`` are rows of ``samples.parquet``; those of other policies are left out. A policy's KL is from the
    reference at the same temperature.
    """
    of_policy = grouped(samples, "policy")
    rows = [policy_row(name, of_policy[name], 0, options) for name in COMPARED]
    return {
        "temperature": temperature,
        "n_prompts": rows[0]["n_prompts"],
        "policies": [{name: row[name] for name in POLICY_FIELDS} for row in rows],
        "win_rates": [dict(row) for row in win_rates],
    }


def side_by_side(
    entries: Sequence[Mapping[str, Any]], main: float, judge: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries in order of temperature with ``verdict`` and ``order_change``, and the warnings about the latter.

    ``judge`` is the judge that decides at each temperature. ``main`` is the temperature of the verdict. ``holm_p``
    corrects over the rows of all temperatures. ``order_change`` is ``{"sure": ..., "sentence": ...}`` where RM + PPO
    and DPO change places between the entry's temperature and ``main``, and None elsewhere. ``verdict``
    marks the entry of ``main``.
    """
    out = [dict(entry) for entry in sorted(entries, key=lambda entry: float(entry["temperature"]))]
    rows = [row for entry in out for row in entry["win_rates"]]
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["holm_p"] = p
    changes = {
        (a["temperature"], b["temperature"]): change
        for a, b in combinations(out, 2)
        if (change := _order_change(a, b, main, judge)) is not None
    }
    for entry in out:
        pair = (min(entry["temperature"], main), max(entry["temperature"], main))
        entry |= {"verdict": entry["temperature"] == main, "order_change": changes.get(pair)}
    sure = {pair: change["sentence"] for pair, change in changes.items() if change["sure"]}
    # Two further temperatures may disagree while the verdict's is undecided: one such pair is enough to say so.
    from_main = [sentence for pair, sentence in sure.items() if main in pair]
    return out, from_main or list(sure.values())[:1]


def _order_change(a: Row, b: Row, main: float, judge: str | None) -> dict[str, Any] | None:
    """What to say where the arms change places between two temperatures. None where they do not."""
    first, second = arms_row(a, judge), arms_row(b, judge)
    if first is None or second is None or (first["win_rate"] - 0.5) * (second["win_rate"] - 0.5) >= 0.0:
        return None
    sure = _leaves_out_half(first) and _leaves_out_half(second)
    sentence = (
        f"at temperature {a['temperature']} {_ahead(first)} is ahead (RM + PPO wins {_share(first)}), "
        f"at {b['temperature']} {_ahead(second)} is ({_share(second)}): "
    )
    sentence += f"the verdict is for {main}" if sure else "not both intervals leave out one half"
    return {"sure": sure, "sentence": sentence}


def arms_row(entry: Row, judge: str | None) -> Row | None:
    """The entry's row of RM + PPO against DPO by this judge. None where there is no such row, or it has no win rate."""
    rows = (row for row in entry["win_rates"] if (row["policy"], row["baseline"], row["judge"]) == (*ARMS, judge))
    return next((row for row in rows if row["win_rate"] is not None), None)


def _leaves_out_half(row: Row) -> bool:
    low, high = row["ci_low"], row["ci_high"]
    return low is not None and high is not None and not low <= 0.5 <= high


def _ahead(row: Row) -> str:
    return NAMES[ARMS[0] if row["win_rate"] > 0.5 else ARMS[1]]


def _share(row: Row) -> str:
    interval = "no interval" if row["ci_low"] is None else f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
    return f"{row['win_rate']:.1%}, {interval}"
