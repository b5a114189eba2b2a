"""The report's tables: numbers of ``results.json`` in the order and the words in which they are shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from toolkit.evals.training_signals import TRAINING_SIGNALS, is_neutral
from toolkit.files import flat
from toolkit.progress import duration
from toolkit.report.plots import ARM_NAMES, REWARDS, policy_name
from toolkit.report.reading import Row, Run, outdated

# What an arm counts in its own unit says nothing when it differs: a step of PPO is a rollout, one of DPO a batch.
OWN_UNITS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
)
FEATURES = {
    "n_tokens": "length, tokens",
    "n_words": "length, words",
    "n_chars": "length, characters",
    "eos": "ends by itself",
    "repetition": "repeated 3-grams",
    "distinct_1": "distinct words in a response",
    "distinct_2": "distinct 2-grams in a response",
    "distinct_3": "distinct 3-grams in a response",
    "corpus_distinct_1": "distinct words over all responses",
    "corpus_distinct_2": "distinct 2-grams over all responses",
    "corpus_distinct_3": "distinct 3-grams over all responses",
    "exclamation_density": "exclamation marks per sentence",
    "list_density": "share of lines that are list items",
}
RATES = {"eos", "repetition", "distinct_1", "distinct_2", "distinct_3", "list_density"} | {
    f"corpus_distinct_{n}" for n in (1, 2, 3)
}


def progress(run: Run) -> list[Row]:
    """The stages of a run that is watched, with their state in words; nothing for any other."""
    rows = []
    for row in run.progress:
        label = row["stage"].replace("_", " ")
        shown = {"label": label, "state": row["state"], "arm": row.get("arm", "base"), "share": None, "facts": []}
        if row["state"] == "done":
            shown["facts"] = [duration(row["wall_s"]), f"{row['tokens']:,} tokens", f"peak {row['peak_gib']:.2f} GiB"]
        elif "total" in row:
            shown["share"] = row["done"] / row["total"] if row["total"] else None
            left = f"{duration(row['left_s'])} left" if row["left_s"] is not None else ""
            shown["facts"] = [
                text for text in (f"{row['label']} {row['done']}/{row['total']}", left, row["note"]) if text
            ]
        rows.append(shown)
    return rows


def verdict(run: Run) -> Row:
    """The sentence, and what stands under it: each judge's row of the two arms, and how many more prompts it takes."""
    found = run.results["verdict"]
    rows = [row for row in run.results["win_rates"] if (row["policy"], row["baseline"]) == ("rm_ppo", "dpo")]
    more = None
    needed, judged = found.get("prompts_needed"), found.get("n_judged")
    undecided_by_noise = (
        found["winner"] == "undecided"
        and found.get("judge") is not None
        and is_neutral(found["judge"])
        and found.get("ci_low") is not None
        and found["ci_low"] <= 0.5 <= found["ci_high"]
    )
    if undecided_by_noise and needed and judged and needed > judged:
        more = {"needed": needed, "judged": judged, "more": needed - judged}
    headline, _, rest = str(found["sentence"]).partition(": ")
    if more:
        rest = rest.partition(" To settle an effect")[0]  # said below, with how many more
    return {
        "headline": headline,
        "rest": rest[:1].upper() + rest[1:],
        "winner": found["winner"],
        "judges": [win_rate(row) for row in rows],
        "more": more,
        "changed": outdated(run),
    }


def win_rate(row: Mapping[str, Any]) -> Row:
    """A row of ``win_rates`` with the names that are shown; ``sure`` where an interval leaves out one half."""

    def sure(low: float | None, high: float | None) -> bool:
        return low is not None and high is not None and not low <= 0.5 <= high

    return {
        **row,
        "name": policy_name(row["policy"]),
        "against": policy_name(row["baseline"]),
        "arm": arm_of(row["policy"]),
        "checkpoint": "@" in row["policy"],
        "signal": TRAINING_SIGNALS.get(row["judge"], ""),
        "sure": sure(row["ci_low"], row["ci_high"]),
        "lc_sure": sure(row["lc_ci_low"], row["lc_ci_high"]),
    }


def win_rates(run: Run) -> list[Row]:
    """Every row: the arms against each other first, then final policies, then checkpoints, by judge."""
    rows = [win_rate(row) for row in run.results["win_rates"]]
    order = {"rm_ppo": 0, "dpo": 1}
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            row["baseline"] != "dpo",
            row["checkpoint"],
            judges.index(row["judge"]),
            order.get(row["arm"], 2),
        ),
    )


def policies(run: Run) -> Row:
    """Rewards, KL, length and end-of-text rate of every policy; a reward that nobody has is left out."""
    rows = run.results["policies"]
    return {
        "rewards": [(key, label) for key, label in REWARDS.items() if any(r[key]["value"] is not None for r in rows)],
        "rows": [{**row, "name": policy_name(row["policy"]), "color": arm_of(row["policy"])} for row in rows],
    }


def peaks(run: Run) -> list[str]:
    """Where Gao et al.'s curve puts the best KL of each arm, in words; nothing where it could not be fitted."""
    out = []
    for arm, part in run.results.get("overoptimization", {}).items():
        for reward, by_kind in part.get("fits", {}).items():
            fit = (by_kind or {}).get("rl")
            if not fit:
                continue
            label = f"{ARM_NAMES[arm]}, {REWARDS[reward]}"
            peak, reach = fit["peak_kl_nats"], max(row["kl_nats"] for row in part["rows"])
            if peak is None:
                out.append(f"{label}: the fitted curve has no peak.")
            elif peak <= reach:
                out.append(f"{label}: the fitted curve peaks at {peak:.2f} nats, and the arm went to {reach:.2f}.")
            else:
                out.append(f"{label}: the fitted curve still rises at the {reach:.2f} nats that the arm reached.")
    return out


def agreement(run: Run) -> Row | None:
    """Explicit and implicit reward on held-out data and on the policies' own samples, one column each."""
    found = run.results.get("implicit_vs_explicit")
    if not found:
        return None
    columns = {"held-out responses": found["held_out"]} | {
        f"samples of {name.replace('sft', 'SFT')}" if name != "all" else "all samples": part
        for name, part in found["on_samples"].items()
    }
    measures = (
        ("accuracy_explicit", "accuracy of the explicit reward", True),
        ("accuracy_implicit", "accuracy of the implicit reward", True),
        ("agreement", "pairs that both order alike", True),
        ("cohen_kappa", "the same, corrected for chance (κ)", False),
        ("spearman", "rank correlation within prompts (Spearman)", False),
        ("kendall", "rank correlation within prompts (Kendall)", False),
        ("margin_correlation", "correlation of margins", False),
        ("margin_slope", "slope of implicit on explicit margins", False),
    )
    rows = [
        {"label": label, "percent": percent, "cells": [part.get(key) for part in columns.values()]}
        for key, label, percent in measures
        if any((part.get(key) or {}).get("value") is not None for part in columns.values())
    ]
    sizes = [(part["n_prompts"], part["n_pairs"]) for part in columns.values()]
    return {"columns": list(columns), "rows": rows, "sizes": sizes, "warning": found["warning"]}


def quality(run: Run) -> Row | None:
    """Accuracy, calibration and length bias of both rewards on held-out comparisons."""
    found = {name: part for name, part in run.results.get("rm_quality", {}).items() if part}
    if not found:
        return None
    measures = (
        ("accuracy", "accuracy", "percent"),
        ("nll", "log loss, nats (0.693 is a coin)", "number"),
        ("brier", "Brier score", "number"),
        ("ece", "expected calibration error", "percent"),
        ("temperature", "temperature that calibrates it best", "number"),
        ("margin_mean", "mean margin to the preferred response", "number"),
        ("accuracy_preferred_longer", "accuracy where the longer one is preferred", "percent"),
        ("accuracy_preferred_shorter", "accuracy where the shorter one is preferred", "percent"),
        ("longer_preferred_rate", "labels that prefer the longer one", "percent"),
        ("length_spearman", "rank correlation of reward and length", "number"),
    )
    rows = []
    for key, label, form in measures:
        cells = [_estimate(part.get(key)) for part in found.values()]
        if any(cell is not None and cell["value"] is not None for cell in cells):
            rows.append({"label": label, "percent": form == "percent", "cells": cells})
    first = next(iter(found.values()))
    return {"columns": [f"{n} reward" for n in found], "rows": rows, "size": (first["n_prompts"], first["n_pairs"])}


def drift(run: Run) -> Row | None:
    """Difference from SFT of each text feature, a column per policy."""
    found = run.results.get("hacking", {})
    by_policy = {name: {row["feature"]: row for row in rows} for name, rows in found.items() if name != "sft" and rows}
    if not by_policy:
        return None
    features = [f for f in FEATURES if any(f in rows for rows in by_policy.values())]
    features += sorted({f for rows in by_policy.values() for f in rows} - set(FEATURES))
    names = sorted(by_policy, key=lambda name: ({"rm_ppo": 0, "dpo": 1}.get(name, 2), name))
    rows = []
    for feature in features:
        cells = [by_policy[name].get(feature) for name in names]
        start = next(cell["sft"] for cell in cells if cell is not None)
        rows.append(
            {"label": FEATURES.get(feature, feature), "percent": feature in RATES, "sft": start, "cells": cells}
        )
    flagged = {name: sum(bool(row["flagged"]) for row in by_policy[name].values()) for name in names}
    columns = [{"name": policy_name(name), "color": arm_of(name), "flagged": flagged[name]} for name in names]
    return {"columns": columns, "rows": rows}


def cost(run: Run) -> Row | None:
    """Time, tokens and peak memory by stage and by arm, and what language-model judges took; ``share`` is of the
    longest stage, for the bars."""
    found = run.results.get("cost")
    if not found or not found["stages"]:
        return None
    longest = max(row["wall_s"] for row in found["stages"]) or 1.0
    stages = [
        {
            **row,
            "time": duration(row["wall_s"]),
            "share": row["wall_s"] / longest,
            "label": row["stage"].replace("_", " "),
        }
        for row in found["stages"]
    ]
    arms = []
    for arm, part in found["arms"].items():
        label = {"shared": "shared by both arms"}.get(arm, ARM_NAMES.get(arm, arm))
        own = [row["label"] for row in stages if row["arm"] == arm]
        arms.append({**part, "arm": arm, "label": label, "time": duration(part["wall_s"]), "stages": ", ".join(own)})
    total = sum(part["wall_s"] for part in found["arms"].values())
    tokens = sum(part["tokens"] for part in found["arms"].values())
    peak = max(part["peak_gib"] for part in found["arms"].values())
    together = {"time": duration(total), "tokens": tokens, "peak_gib": peak}
    return {"stages": stages, "arms": arms, "total": together, "judges": found.get("judges", [])}


def settings(run: Run) -> Row | None:
    """What the arms share by name, PPO's value beside DPO's, and what only one of them has."""
    ppo, dpo = run.recipe.get("ppo"), run.recipe.get("dpo")
    if not ppo or not dpo:
        return None
    shared = [
        {"name": name, "ppo": show(ppo[name]), "dpo": show(dpo[name]), "own": name in OWN_UNITS}
        | {"differs": ppo[name] != dpo[name] and name not in OWN_UNITS}
        for name in ppo
        if name in dpo
    ]
    shared.sort(key=lambda row: (not row["differs"], row["ppo"] == row["dpo"]))
    return {
        "shared": shared,
        "ppo": [(name, show(value)) for name, value in ppo.items() if name not in dpo],
        "dpo": [(name, show(value)) for name, value in dpo.items() if name not in ppo],
        "differences": sum(row["differs"] for row in shared),
    }


def reproduction(run: Run) -> Row | None:
    """Command, seed, versions, fingerprints and machine; None where the folder has no manifest."""
    manifest = run.manifest
    if not manifest:
        return None
    started = manifest.get("started")
    keys = {name: key for name, key in manifest.get("keys", {}).items() if name != "report"}
    machine = {k: v for k, v in manifest.get("machine", {}).items() if v not in ("", None)}
    data = run.data_report
    facts = {
        "recipe": manifest.get("name"),
        "seed": manifest.get("seed"),
        "started": f"{datetime.fromtimestamp(started, tz=UTC):%Y-%m-%d %H:%M} UTC" if started else None,
        "data": data.get("source"),
        "fingerprint of the data": data.get("source_fingerprint"),
        "machine": ", ".join(f"{v} CPUs" if k == "cpus" else str(v) for k, v in machine.items()),
    }
    return {
        "command": shlex.join(manifest.get("command", [])),
        "facts": {name: value for name, value in facts.items() if value not in (None, "")},
        "versions": manifest.get("versions", {}),
        "keys": keys,
        "recipe": run.recipe_text,
    }


def data(run: Run) -> Row | None:
    """How much data there was, and what was left out of it."""
    report = run.data_report
    if "train" not in report or "eval" not in report:
        return None
    odd = {
        "n_empty": "rows with an empty prompt or response were left out",
        "n_unparsable": "rows without a common prompt were left out",
        "n_duplicates": "rows are exact duplicates",
        "n_contradictions": "labels contradict another label on the same two responses",
        "n_identical": "comparisons of a response with itself count as ties",
    }
    notes = [f"{report[key]:,} {meaning}" for key, meaning in odd.items() if report.get(key)]
    for side in ("train", "eval"):
        if report[side]["n_long_prompts"]:
            notes.append(f"{side}: {report[side]['n_long_prompts']:,} prompts too long and left out")
        if report[side]["n_long_responses"]:
            share = report[side]["n_long_responses"] / max(1, report[side]["n_responses"])
            notes.append(f"{side}: {report[side]['n_long_responses']:,} responses ({share:.0%}) cut at the limit")
    return {"sides": {"training": report["train"], "held out": report["eval"]}, "notes": notes}


def between_runs(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings of the recipes that are not the same in all runs: name, and each run's value."""
    recipes = [flat(run.recipe) for run in runs]
    names = dict.fromkeys(
        name for recipe in recipes for name in recipe if not name.startswith(("report.", "report_to"))
    )
    absent = object()
    return [
        (name, ["" if name not in recipe else show(recipe[name]) for recipe in recipes])
        for name in names
        if any(recipe.get(name, absent) != recipes[0].get(name, absent) for recipe in recipes)
    ]


def show(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def arm_of(policy: str) -> str:
    head = policy.partition("@")[0]
    return "best_of_n" if head.startswith("best_of_") else head if head in ARM_NAMES else "other"


def _estimate(value: Any) -> Row | None:
    """An estimate as it is, or a bare number as one without an interval."""
    if value is None or isinstance(value, Mapping):
        return dict(value) if value is not None else None
    return {"value": float(value), "ci_low": None, "ci_high": None}
