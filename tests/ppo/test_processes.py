"""PPO in several processes, and PPO that is killed: the same numbers as one process that runs through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ppo_models import timeless

pytestmark = pytest.mark.invariant

# Adam divides a gradient by its size, so one that is zero up to rounding moves a weight by the whole rate. With a large
# epsilon a step is proportional to the gradient, and the weights can be compared.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.engine.distributed import leave_group

torch.set_num_threads(1)
options = json.loads(sys.argv[1])
kill_at = options.pop("kill_at", None)
resume = options.pop("resume", None)
full = options.pop("full", False)
# Every seventh id ends a response: some end, and their scores count; some are cut.
options.setdefault("stop_token_ids", [2, *range(9, 2048, 7)])


def reward(completion_ids, wanted, **_):
    return [float(sum(ids) % 7 == want) - 0.1 * len(ids) for ids, want in zip(completion_ids, wanted)]


prompts = [{"prompt": f"The film number {i} was", "wanted": i} for i in range(7)]
args = PPOConfig(
    learning_rate=1e-3 if full else 1.0, adam_epsilon=1.0, samples_per_prompt=2, total_episodes=24, num_ppo_epochs=2,
    num_mini_batches=2, response_length=8, logging_steps=1, save_steps=4, use_cpu=True, report_to="none",
    disable_tqdm=True, whiten_rewards=True, lr_scheduler_type="linear", **options,
)
peft = None if full else LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
more = {"ptx_dataset": [{"prompt": "It was", "completion": f" number {i}."} for i in range(5)]} if args.ptx_coef else {}
trainer = PPOTrainer("tiny", args, reward, prompts, eval_dataset=prompts[:5], peft_config=peft, **more)
training_step = trainer.training_step


def dying(*inputs, **more):
    loss = training_step(*inputs, **more)
    if trainer.state.global_step == kill_at:  # gradients are there, the optimiser has not stepped
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


trainer.training_step = dying
trainer.train(resume_from_checkpoint=resume)
result = trainer.evaluate()
if trainer.is_world_process_zero():
    out = Path(args.output_dir)
    save_file({n: w.contiguous() for n, w in trainer.models.trained_state().items()}, out / "state.safetensors")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    (out / "logs.json").write_text(json.dumps([logs, result]))
leave_group()
"""


def run(folder: Path, *, processes: int = 1, expected: int = 0, **options: Any) -> None:
    script = folder.parent / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script)]
    if processes > 1:
        # Without --multi_gpu accelerate starts a single process where there is no GPU; the processes then take gloo.
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command = [sys.executable, *launch, str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command.append(json.dumps({"output_dir": str(folder), **options}))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == expected, done.stderr[-3000:]


def results(folder: Path) -> tuple[Any, Any, Any]:
    logs, evaluation = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
    return load_file(folder / "state.safetensors"), logs, evaluation


@pytest.mark.parametrize("bf16", [False, True])
def test_two_processes_equal_one(tmp_path: Path, bf16: bool) -> None:
    run(tmp_path / "one", per_device_train_batch_size=8, bf16=bf16)
    run(tmp_path / "two", per_device_train_batch_size=4, bf16=bf16, processes=2)
    one, ones, evaluated = results(tmp_path / "one")
    two, twos, evaluated_by_two = results(tmp_path / "two")
    tolerance = 2e-2 if bf16 else 1e-4
    assert len(ones) == len(twos) == 12
    for log in ones[:1] + twos[:1]:
        assert log["policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert log["objective/kl"] == log["policy/approx_kl"] == log["policy/clip_fraction"] == 0
    # In bf16 the first updates differ by rounding, and a token that is drawn differently changes what follows.
    compared = 1 if bf16 else len(ones)
    for log, same in zip(ones[:compared], twos[:compared], strict=True):
        assert log.keys() == same.keys()
        assert timeless(log) == pytest.approx(timeless(same), rel=tolerance, abs=tolerance)
    moved = max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name)
    assert moved > 1e-3 and one.keys() == two.keys()
    if bf16:
        return
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < tolerance * moved, name
    for name in ("eval_objective/score", "eval_objective/kl", "eval_length/mean", "eval_eos_rate"):
        assert evaluated[name] == pytest.approx(evaluated_by_two[name], rel=tolerance, abs=tolerance)


def test_two_processes_equal_one_behind_a_critics_warm_up(tmp_path: Path) -> None:
    """While the critic alone trains, the policy has no gradient, and the optimiser's count of its steps must stay."""
    more = {"critic_warmup_rollouts": 1, "weight_decay": 0.1}
    run(tmp_path / "one", per_device_train_batch_size=8, **more)
    run(tmp_path / "two", per_device_train_batch_size=4, processes=2, **more)
    one, two = results(tmp_path / "one")[0], results(tmp_path / "two")[0]
    moved = max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-4 * moved, name


@pytest.mark.parametrize(
    "more",
    [
        {"share_trunk": True, "adaptive_kl": True, "adaptive_kl_target": 0.01, "adaptive_kl_horizon": 50},
        {"full": True, "center_samples": 5, "ema_decay": 0.9, "ptx_coef": 0.5, "ptx_batch_size": 3},
    ],
    ids=["trunk", "all weights"],
)
def test_two_processes_equal_one_with_options(tmp_path: Path, more: dict[str, Any]) -> None:
    run(tmp_path / "one", per_device_train_batch_size=8, **more)
    run(tmp_path / "two", per_device_train_batch_size=4, processes=2, **more)
    (one, ones, _), (two, twos, _) = results(tmp_path / "one"), results(tmp_path / "two")
    for log, same in zip(ones, twos, strict=True):
        assert timeless(log) == pytest.approx(timeless(same), rel=1e-3, abs=1e-4)
    assert len({log["objective/score"] for log in ones if "objective/score" in log}) == 3
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=2e-4, msg=name)
    if "ema_decay" in more:
        averages = [load_file(tmp_path / name / "checkpoint-12" / "average.safetensors") for name in ("one", "two")]
        for name, weight in averages[0].items():
            torch.testing.assert_close(weight, averages[1][name], rtol=0, atol=2e-4, msg=name)


def test_killed_in_an_update_and_run_again(tmp_path: Path) -> None:
    run(tmp_path / "whole", per_device_train_batch_size=8)
    run(tmp_path / "killed", per_device_train_batch_size=8, kill_at=6, expected=-signal.SIGKILL)
    assert not (tmp_path / "killed" / "state.safetensors").exists()
    run(tmp_path / "killed", per_device_train_batch_size=8, resume=str(tmp_path / "killed" / "checkpoint-4"))
    whole, logs, evaluated = results(tmp_path / "whole")
    again, logs_again, evaluated_again = results(tmp_path / "killed")
    for name, weight in whole.items():
        assert bool((weight == again[name]).all()), name
    times = ("eval_runtime",)
    assert {k: v for k, v in evaluated.items() if k not in times} == evaluated_again
    assert [log["loss"] for log in logs[4:]] == [log["loss"] for log in logs_again[-8:]]
