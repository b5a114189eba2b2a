"""What PPO writes for people to read: a model card, and tables of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from toolkit.files import write_table
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.rollout_metrics import CompletionRow
from toolkit.preferences.rows import readable

CARD_METRICS = (
    "objective/score",
    "objective/kl",
    "objective/entropy",
    "length/mean",
    "eos_rate",
    "value/explained_variance",
)


def ppo_settings(args: PPOConfig) -> dict[str, Any]:
    """What PPO adds to ``TrainingArguments``, and the learning rate and seed."""
    base = {f.name for f in fields(transformers.TrainingArguments)}
    redefined = {"learning_rate", "per_device_train_batch_size", "seed", "max_steps", "adam_epsilon", "bf16"}
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in base or f.name in redefined}


def write_card(folder: Path, args: PPOConfig, history: Sequence[dict[str, Any]], rollouts: int) -> None:
    """``README.md`` of an exported policy: its settings, and the first and last point of its curves."""
    logs = [entry for entry in history if "objective/score" in entry]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [ppo, rlhf, rlhf-duel]",
        "---",
        "",
        "# A policy trained with PPO",
        "",
        f"Trained by `toolkit.ppo.PPOTrainer` of rlhf-duel in {rollouts} rollouts. It loads with transformers, with",
        "peft as well where it is an adapter.",
        "",
    ]
    if logs:
        lines += ["| metric | first logged | last logged |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {logs[0][name]:.4g} | {logs[-1][name]:.4g} |" for name in CARD_METRICS if name in logs[-1]
        ]
        lines += ["", "`objective/kl` is in nats per response to the policy that training started from.", ""]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {value} |" for name, value in ppo_settings(args).items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_completions(rows: Sequence[CompletionRow], out: Path, step: int) -> None:
    """``completions/completions_STEP.parquet``, as TRL's online trainers name it: one row per response."""
    folder = out / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    table = [{"step": step, **vars(row), "prompt": readable(row.prompt)} for row in rows]
    write_table(table, folder / f"completions_{step:05d}.parquet")
