"""Recorded tables of studies, as columns, with arms that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Columns = dict[str, list[Any]]
# The expected score of a policy: arm, number of the setting, number of the checkpoint.
Mean = Callable[[str, int, int], float]


def equal_arms(arm: str, setting: int, checkpoint: int) -> float:
    return 0.4 * checkpoint - 0.4 * setting


def study_rows(
    mean: Mean = equal_arms,
    *,
    arms: Sequence[str] = ("rm_ppo", "dpo"),
    seeds: int = 3,
    settings: int = 3,
    checkpoints: int = 2,
    prompts: int = 40,
    seed_sd: float = 0.05,
    noise: float = 1.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of a table; KL and cost grow with the checkpoint, alike in both arms."""
    rng = np.random.default_rng(seed)
    for arm in arms:
        for s in range(settings):
            for k in range(seeds):
                run = seed_sd * rng.normal()
                for c in range(checkpoints):
                    for split in ("dev", "test"):
                        for i in range(prompts):
                            yield {
                                "arm": arm,
                                "setting": f"setting {s}",
                                "seed": k,
                                "checkpoint": 100 * (c + 1),
                                "split": split,
                                "prompt_id": f"{split}-{i}",
                                "kl_nats": 1.0 + 2.0 * c + 0.1 * s,
                                "train_tokens": 1e5 * (c + 1),
                                "wall_s": 60.0 * (c + 1),
                                "score": mean(arm, s, c) + run + noise * float(rng.normal()),
                            }


def columns(rows: Sequence[dict[str, Any]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_study(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    pq.write_table(pa.table(columns(rows)), path)
    return path
