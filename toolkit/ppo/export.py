"""What PPO writes for people to read: a model card, and tables of completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from toolkit.files import write_table, write_text
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.rollout_metrics import CompletionRow
from toolkit.preferences.rows import readable
from toolkit.progress import COMPLETIONS_FILE

# Of the prompts of a rollout, so many are shown with all their completions.
PROMPTS_SHOWN = 4
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


def some_completions(rows: Sequence[CompletionRow], step: int) -> list[dict[str, Any]]:
    """The rows of a few prompts of a rollout, for people to read. Which ones does not depend on their order."""
    ordered = sorted(rows, key=lambda row: (row.prompt_id, row.completion))
    shown = list(dict.fromkeys(row.prompt_id for row in ordered))[:PROMPTS_SHOWN]
    return [{"step": step, **vars(row), "prompt": readable(row.prompt)} for row in ordered if row.prompt_id in shown]


def append_completions(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Add a rollout's records to ``completions.jsonl``. Those of the same and later steps are of a training that was
    killed, and leave."""
    file, step = out / COMPLETIONS_FILE, records[0]["step"]
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    before = [line for line in lines if json.loads(line)["step"] < step]
    write_text(file, "".join(f"{line}\n" for line in [*before, *(json.dumps(record) for record in records)]))
