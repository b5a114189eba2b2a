"""A run whose stages have two processes: what follows ``--`` reaches ``accelerate launch``, and they share the
work, also where there is no GPU. In test_signals.py they share SFT, and end with their run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import SMALL, duel_process

from toolkit.errors import RecipeError
from toolkit.runs.launch import number_of_processes
from toolkit.stages.__main__ import check_processes


def test_how_many_processes_the_arguments_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert number_of_processes(()) == 1
    assert number_of_processes(["--num_processes", "3"]) == number_of_processes(["--num-processes=3"]) == 3
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    assert number_of_processes(["--config_file", str(config)]) == 4
    assert number_of_processes([f"--config_file={config}", "--num_processes", "2"]) == 2
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert number_of_processes(["--mixed_precision", "bf16"]) == 8
    with pytest.raises(RecipeError, match="no such file"):
        number_of_processes(["--config_file", str(tmp_path / "none")])
    with pytest.raises(RecipeError, match="0 processes"):
        number_of_processes(["--num_processes", "0"])


def test_a_stage_refuses_another_number_of_processes_than_its_key_says() -> None:
    check_processes(2, 2)
    with pytest.raises(RecipeError, match="started 4 processes, and the stage's key is that of 2"):
        check_processes(4, 2)


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_share_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    milestones = [
        "--set=dpo.per_device_train_batch_size=8",
        "--set=dpo.logging_steps=1",
        "--set=dpo.num_checkpoints=1",
        "--set=dpo.kl_milestones=[0.000001]",
    ]
    options = [*SMALL, *milestones, "--out", str(out)]
    done = duel_process("run", "smoke", *options, "--", "--num_processes", "2")
    assert "Traceback" not in done.stderr
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        record = json.loads((out / stage / "stage.json").read_text(encoding="utf-8"))
        assert record["metrics"]["processes"] == record["fields"]["processes"] == 2, stage
    # The evaluation is the same for any number of processes, so its key does not have it.
    evaluated = json.loads((out / "evaluate" / "stage.json").read_text(encoding="utf-8"))
    assert evaluated["metrics"]["processes"] == 2 and "processes" not in evaluated["fields"]
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["verdict"]
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
    assert not (out / "dpo" / "checkpoints").is_dir() or (out / "dpo" / "checkpoints" / "kl-1e-06").is_dir()
    # One process takes none of it for its own.
    planned = json.loads(duel_process("run", "smoke", *options, "--dry-run", "--json").stdout)
    states = {stage["stage"]: (stage["state"], stage["changed"]) for stage in planned["stages"]}
    assert states["data"] == ("cached", [])
    assert all(states[stage] == ("stale", ["processes"]) for stage in ("sft", "reward_model", "ppo", "dpo"))
