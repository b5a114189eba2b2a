"""A study that goes on, as its folder has it: trials in every state."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from toolkit.files import write_json

SETTINGS = {
    "rm_ppo": ("kl_coef=0.05 learning_rate=0.0003", "kl_coef=0.2"),
    "dpo": ("beta=0.05", "beta=0.2 <b>bold</b>"),
}
STAGES = {"rm_ppo": "ppo", "dpo": "dpo", "sft": "sft"}


def write_begun_study(folder: Path, seeds: int = 2) -> Path:
    """PPO's trials: measured, trained, in the middle (begun), failed. DPO's trials wait."""
    trials = [_planned("sft", 1, "sft", seed) for seed in range(seeds)]
    for arm, settings in SETTINGS.items():
        trials += [_planned(arm, n, name, seed) for n, name in enumerate(settings, 1) for seed in range(seeds)]
    write_json(folder / "trials.json", {"recipe": "study-tiny", "started": time.time() - 60, "trials": trials})
    for trial in trials:
        if trial["arm"] == "sft":
            finish(folder, trial["name"], "sft")
    finish(folder, "rm_ppo-1-seed0", "ppo", measured=("dev-1-a", "dev-2-a", "test-2-a"))
    finish(folder, "rm_ppo-1-seed1", "ppo", measured=("dev-1-a",))
    begin(folder, "rm_ppo-2-seed0", "ppo")
    failed = begin(folder, "rm_ppo-2-seed1", "ppo")
    reason = {"kind": "diverged", "reason": "the KL to <script>alert(1)</script> is not finite", "key": "key of ppo"}
    write_json(failed / "failed.json", reason)
    return folder


def _planned(arm: str, number: int, setting: str, seed: int) -> dict[str, Any]:
    name = f"sft-seed{seed}" if arm == "sft" else f"{arm}-{number}-seed{seed}"
    stage = STAGES[arm]
    n_checkpoints = 1 if arm == "sft" else 2
    return {"name": name, "arm": arm, "setting": setting, "seed": seed, "stage": stage, "n_checkpoints": n_checkpoints}


def begin(folder: Path, name: str, stage: str) -> Path:
    """A trial whose last stage works, or was interrupted."""
    trial = folder / "trials" / name
    keys = {"data": "a", "sft": "b", stage: f"key of {stage}"}
    stages = {"data": {}, "sft": {}}
    write_json(trial / "manifest.json", {"keys": keys, "stages": stages, "started": time.time() - 30})
    log = [{"stage": stage, **entry(stage, step)} for step in range(1, 4)]
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return trial


def entry(stage: str, step: int) -> dict[str, float]:
    """What a stage logs at a step."""
    if stage == "ppo":
        return {"step": step, "objective/score": 0.1 * step, "objective/kl": 0.5 * step}
    return {"step": step, "rewards/accuracies": 0.5 + 0.1 * step, "loss": 0.7 - 0.1 * step}


def finish(folder: Path, name: str, stage: str, measured: tuple[str, ...] = ()) -> None:
    """A trained trial with these files of samples."""
    trial = begin(folder, name, stage)
    key = json.loads((trial / "manifest.json").read_text())["keys"][stage]
    history = [entry(stage, step) for step in range(1, 9)]
    write_json(trial / stage / "stage.json", {"key": key, "wall_s": 12.0, "metrics": {"history": history}})
    (trial / "scores").mkdir(exist_ok=True)
    for file in measured:
        (trial / "scores" / f"{file}.samples.parquet").touch()
