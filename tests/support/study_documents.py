"""The documents of studies of every kind: decided or not, with controls, with one seed, with trials that diverged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.study_tables import columns, equal_arms, study_rows
from toolkit.evals.study.study import study
from toolkit.evals.study.table import study_data

Rows = list[dict[str, Any]]
ARMS = ("rm_ppo", "dpo")
CONTROLS = ("online_dpo", "rloo", "length_only", "sft")


def document(rows: Rows, **options: Any) -> dict[str, Any]:
    return study(study_data(columns(rows)), **options)


def better(arm: str, setting: int, checkpoint: int) -> float:
    return equal_arms(arm, setting, checkpoint) + {"rm_ppo": 1.5, "rloo": 0.8, "sft": -1.0}.get(arm, 0.0)


def far_apart() -> Rows:
    return [{**row, "kl_nats": row["kl_nats"] + 20 * (row["arm"] == "dpo")} for row in study_rows()]


def diverged() -> Rows:
    lost = ("rm_ppo", "setting 1", 0)
    return [
        {**row, "score": float("nan")} if (row["arm"], row["setting"], row["seed"]) == lost else row
        for row in study_rows(better)
    ]


def judged() -> Rows:
    rows = list(study_rows(better))
    return [{**row, "judge": j, "score": k * row["score"]} for j, k in (("gold", 1), ("rm", -1)) for row in rows]


def preferred() -> Rows:
    rows = []
    for row in study_rows(better, arms=(*ARMS, "rloo")):
        score = row.pop("score")
        rows.append({**row, "baseline": "sft", "preference": float(score > 0)})
    return rows


def untested() -> Rows:
    return [r for r in study_rows() if r["split"] == "dev" or r["setting"] == "setting 0"]


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "better": lambda: document(list(study_rows(better, arms=(*ARMS, *CONTROLS), prompts=60))),
    "equal": lambda: document(list(study_rows(prompts=60)), kl_limit=2.5),
    "one seed": lambda: document(list(study_rows(better, seeds=1, arms=(*ARMS, "rloo")))),
    "one trial": lambda: document(list(study_rows(settings=1, checkpoints=1))),
    "no common KL": lambda: document(far_apart()),
    "diverged": lambda: document(diverged()),
    "judges": lambda: document(judged()),
    "preferences": lambda: document(preferred()),
    "untested": lambda: document(untested()),
    "other control": lambda: document(list(study_rows(arms=(*ARMS, "mine")))),
}
