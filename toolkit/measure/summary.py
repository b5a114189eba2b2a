"""What the rewards of a reading say: counts, accuracy, and the check of an implicit against an explicit reward."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ModelError
from toolkit.evals.agreement import (
    EstimateDict,
    compare_on_samples,
    compare_rewards,
    estimate_dict,
    pairwise_accuracy,
)
from toolkit.evals.rm_quality import calibration, rm_quality
from toolkit.evals.slices import agreement_by_slice, disagreements
from toolkit.files import written_whole
from toolkit.judging.independence import seen_in_training
from toolkit.measure.reading import Reading
from toolkit.models.resolve import ModelRef
from toolkit.preferences.rows import readable

Rewards = Sequence[NDArray[np.float64]]  # by row: [K], one reward for each response


def summary_path(out: Path) -> Path:
    """The file with the summary of the rewards in ``out``."""
    return out.with_suffix(".summary.json")


def disagreements_path(out: Path) -> Path:
    """The file with the pairs that the rewards in ``out`` order differently."""
    return out.with_suffix(".disagreements.jsonl")


def check_finite(rewards: Rewards, model: str) -> None:
    """Raises ModelError for rewards that are not finite, with the number of them."""
    missing = sum(int(np.count_nonzero(~np.isfinite(values))) for values in rewards)
    if missing:
        total = sum(map(len, rewards))
        raise ModelError(f"{missing} of {total} scores are no finite numbers", where=model, fix="score every response")


def summarise_rewards(reading: Reading, rewards: Rewards, models: Sequence[ModelRef], started: float) -> dict[str, Any]:
    """Counts, speed, and the quality of ``rewards`` on the data's comparisons.

    ``models`` are those that give the rewards: ``n_trained_prompts`` of the data's prompts were in their training.
    ``started`` is when the command began, on the monotonic clock. Raises ModelError for rewards that are not finite.
    """
    check_finite(rewards, ", ".join(model.spec for model in models))
    comparisons, n = reading.comparisons, reading.n_data
    n_responses = sum(len(values) for values in rewards)
    seconds = time.monotonic() - started
    summary: dict[str, Any] = {
        "n_prompts": n,
        "n_responses": n_responses,
        "n_comparisons": len(comparisons),
        "n_trained_prompts": seen_in_training(models, (row.row.prompt_id for row in reading.rows[:n])),
        **reading.counts,
        "accuracy": None,
        "accuracy_ci": None,
    }
    if comparisons:
        rows = reading.rows[:n]
        quality = rm_quality(
            comparisons,
            rewards[:n],
            prompt_ids=[row.row.prompt_id for row in rows],
            lengths=[row.lengths for row in rows],
        )
        accuracy: Any = quality["accuracy"]
        summary |= {"accuracy": accuracy["value"], "accuracy_ci": [accuracy["ci_low"], accuracy["ci_high"]]}
        summary["quality"] = quality
    return summary | {"seconds": round(seconds, 3), "responses_per_second": round(n_responses / seconds, 3)}


def accuracy_per_token(reading: Reading, rewards: Rewards, *, already_means: bool) -> EstimateDict:
    """Pairwise accuracy of the mean rewards per token: of the column ``implicit_reward_mean``.

    ``rewards`` are sums over the tokens, or ``already_means``, as those that IPO defines.
    """
    means: Rewards = rewards
    if not already_means:
        means = [of_row / row.lengths for of_row, row in zip(rewards, reading.rows, strict=True)]
    prompt_ids = [row.row.prompt_id for row in reading.rows]
    return estimate_dict(pairwise_accuracy(reading.comparisons, means, prompt_ids=prompt_ids))


def check_against_explicit(reading: Reading, explicit: Rewards, implicit: Rewards, out: Path) -> dict[str, Any]:
    """The check of the implicit against the explicit rewards, on the data and on each origin of samples.

    The pairs on which both disagree go to ``OUT.disagreements.jsonl``, the clearest first.
    """
    n = reading.n_data
    samples = {
        origin: _on_samples(reading, explicit, implicit, origin)
        for origin in dict.fromkeys(row.origin for row in reading.rows[n:])
    }
    prompt_ids, comparisons = [row.row.prompt_id for row in reading.rows[:n]], reading.comparisons
    explicit, implicit = explicit[:n], implicit[:n]
    check: dict[str, Any] = dict(compare_rewards(prompt_ids, comparisons, explicit, implicit))
    if samples:
        check["samples"] = samples
    if comparisons:
        check["calibration"] = {
            "explicit": calibration(comparisons, explicit, prompt_ids=prompt_ids),
            "implicit": calibration(comparisons, implicit, prompt_ids=prompt_ids),
        }
        lengths = [row.lengths for row in reading.rows[:n]]
        check["splits"] = agreement_by_slice(prompt_ids, comparisons, explicit, implicit, lengths)
    path, n_disagreements = disagreements_path(out), 0
    with written_whole(path) as lines:
        for record in _disagreements(reading, explicit, implicit):
            lines.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            n_disagreements += 1
    return {"implicit_vs_explicit": check, "n_disagreements": n_disagreements, "disagreements": str(path)}


def _on_samples(reading: Reading, explicit: Rewards, implicit: Rewards, origin: str) -> dict[str, Any]:
    at = [p for p, row in enumerate(reading.rows) if row.origin == origin]
    return compare_on_samples(
        [reading.rows[p].row.prompt_id for p in at],
        [reading.rows[p].row.responses for p in at],
        [explicit[p] for p in at],
        [implicit[p] for p in at],
        [reading.rows[p].row.gold for p in at],
    )


def _disagreements(reading: Reading, explicit: Rewards, implicit: Rewards) -> Iterator[dict[str, Any]]:
    comparisons = reading.comparisons
    for index, explicit_margin, implicit_margin in disagreements(comparisons, explicit, implicit):
        p, i, j, prefers_i, _ = comparisons[index]
        of_prompt = reading.rows[p]
        row, lengths = of_prompt.row, of_prompt.lengths
        yield {
            "prompt_id": row.prompt_id,
            "prompt": readable(row.prompt),
            "response_a": row.responses[i],
            "response_b": row.responses[j],
            "label_prefers_a": prefers_i,
            "explicit_margin": explicit_margin,
            "implicit_margin": implicit_margin,
            "n_tokens_a": int(lengths[i]),
            "n_tokens_b": int(lengths[j]),
        }
