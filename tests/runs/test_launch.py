"""A run whose training stages have two processes: what follows ``--`` reaches ``accelerate launch``, and they share the
work, also where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import SMALL, duel_process

pytestmark = pytest.mark.e2e


def test_two_processes_train_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    milestones = [
        "--set=dpo.per_device_train_batch_size=8",
        "--set=dpo.logging_steps=1",
        "--set=dpo.num_checkpoints=1",
        "--set=dpo.kl_milestones=[0.000001]",
    ]
    options = [*SMALL, *milestones, "--out", str(out), "--until", "dpo"]
    done = duel_process("run", "smoke", *options, "--", "--num_processes", "2")
    assert "Traceback" not in done.stderr
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        record = json.loads((out / stage / "stage.json").read_text(encoding="utf-8"))
        assert record["metrics"]["processes"] == 2, stage
    assert record["metrics"]["steps"] == 2  # DPO's 24 prompts, 8 for each process
    for arm in ("ppo", "dpo"):
        assert (out / arm / "model" / "model.safetensors").is_file()
    curves = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The smoke recipe's 16 responses are those of each process: one rollout of 32 for both.
    rollouts = [entry for entry in curves if entry.get("stage") == "ppo" and "objective/kl" in entry]
    assert len(rollouts) == 1 and rollouts[0]["objective/kl"] == 0
    # Each process samples its share of the prompts that DPO's KL is estimated on.
    kl = [entry["objective/kl"] for entry in curves if entry.get("stage") == "dpo" and "objective/kl" in entry]
    assert len(kl) == 2 and all(isinstance(value, float) for value in kl)
    assert (out / "dpo" / "checkpoints").is_dir() == (kl[0] > 0.000001)
