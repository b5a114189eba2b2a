"""What the stages of further rounds left on disk, as ``rounds`` of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.rounds import FreshSamples, round_rows, round_warnings
from toolkit.evals.verdict import ARMS
from toolkit.files import read_json
from toolkit.preferences import splits
from toolkit.preferences.fresh import read_fresh
from toolkit.recipe.rounds import kind_of, round_of
from toolkit.runs.store import STAGE_FILE

# The stage whose rewards an arm's samples had before it was trained on them.
REWARDS_OF = dict(zip(ARMS, ("reward_model", "dpo"), strict=True))


def rounds_of(inputs: Mapping[str, Path], kind: str) -> dict[int, Path]:
    """Round -> the folder of its stage of this kind, of rounds that the inputs number: ``ppo@1``, ``labels@2``."""
    numbered = [role for role in inputs if kind_of(role) == kind and "@" in role]
    return {round_of(role): inputs[role] for role in sorted(numbered, key=round_of)}


def add_rounds(
    result: dict[str, Any], inputs: Mapping[str, Path], judges: Sequence[str], options: BootstrapOptions
) -> None:
    """Add ``rounds`` to an evaluation's results, with warnings and what language models took for the labels."""
    folders = rounds_of(inputs, "labels")
    records = {round_: read_json(folder / STAGE_FILE)["metrics"] for round_, folder in folders.items()}
    fresh = {
        round_: {arm: _fresh(folder, arm, _stage(inputs, REWARDS_OF[arm], round_)) for arm in ARMS}
        for round_, folder in folders.items()
    }
    rows = round_rows(result["policies"], result["win_rates"], records, fresh, options)
    result["rounds"] = rows
    result["warnings"] += round_warnings(rows, judges)
    result["judge_usage"] += [usage for record in records.values() for usage in record["usages"]]


def _stage(inputs: Mapping[str, Path], kind: str, round_: int) -> Path:
    """The folder of a kind of stage in a round; the last one has the name of the kind alone."""
    return inputs.get(f"{kind}@{round_}", inputs[kind])


def _fresh(labels: Path, arm: str, stage: Path) -> FreshSamples:
    rows, rewards = read_fresh(labels, arm, stage)
    comparisons = [(p, pair.i, pair.j, pair.p, pair.weight) for p, row in enumerate(rows) for pair in splits.pairs(row)]
    return FreshSamples(comparisons, rewards)


def summed_records(inputs: Mapping[str, Path], stage: str) -> dict[str, Any]:
    """The record of an arm's last stage, with the response tokens of all rounds' training.

    How many different prompts several rounds saw is not recorded: ``prompts_seen`` is None then.
    """
    record = read_json(inputs[stage] / STAGE_FILE)
    earlier = [read_json(folder / STAGE_FILE)["metrics"] for folder in rounds_of(inputs, stage).values()]
    if earlier:
        metrics = record["metrics"]
        tokens = [of_round["response_tokens_trained"] for of_round in [*earlier, metrics]]
        record["metrics"] = metrics | {"response_tokens_trained": sum(tokens), "prompts_seen": None}
    return record
