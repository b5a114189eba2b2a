"""Whether a judge of a run is independent of it: what its models were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.files import read_table
from toolkit.models.resolve import resolve, resolve_base

TRAINED_ON_FILE = Path("data") / "train.parquet"


def trained_prompts(model: str) -> set[str]:
    """Ids of the prompts that a model was trained on, where it lies in a run folder of duel or is an adapter on a model
    there; none where that is not known."""
    ref = resolve(model)
    folders = [Path(ref.path)]
    if ref.kind == "adapter":
        folders.append(Path(resolve_base(Path(ref.path)).path))
    for folder in folders:
        for parent in folder.resolve().parents:
            data = parent / TRAINED_ON_FILE
            if (parent / "manifest.json").is_file() and data.is_file():
                return {str(row["prompt_id"]) for row in read_table(data, ["prompt_id"])}
    return set()


def dependence(judges: Sequence[str], prompt_ids: Sequence[str]) -> dict[str, str]:
    """Judge -> the reason why it cannot decide: it is a model that was trained on prompts of this evaluation."""
    reasons = {}
    for spec in judges:
        kind, _, models = spec.partition(":")
        if kind not in ("rm", "implicit") or not models:
            continue
        known = set[str]().union(*(trained_prompts(name.strip()) for name in models.split(",")))
        if seen := len(known & set(prompt_ids)):
            reasons[spec] = f"a model that was trained on {seen} of these {len(set(prompt_ids))} prompts"
    return reasons
