"""PPO trainings with settings in JSON, here or in other processes: ``python -m support.ppo_training SETTINGS``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from support.sharded_training import StopBehind
from toolkit.engine.distributed import leave_group
from toolkit.models.sharding import Sharding, full_state, sharded_training
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.ppo.models import PPOModels, SeparateModels

PROMPTS = [{"prompt": f"The film number {i} was", "wanted": i} for i in range(7)]
TEXT = [{"prompt": "It was", "completion": f" number {i}."} for i in range(5)]


def reward(completion_ids: list[list[int]], wanted: list[int], **_: Any) -> list[float]:
    return [float(sum(ids) % 7 == want) - 0.1 * len(ids) for ids, want in zip(completion_ids, wanted, strict=True)]


def train(output_dir: str, *, sharded: bool = False, interrupted: bool = False, **options: Any) -> None:
    """Writes the trained weights and the logs into ``output_dir``; ``options`` are those of :func:`train_once`.

    With ``sharded`` the processes share all weights. With ``interrupted`` training ends behind step 4, and resumes.
    """
    with sharded_training(Sharding() if sharded else None):
        if interrupted:
            train_once(output_dir, stop_behind=4, **options)
            options["resume"] = f"{output_dir}/checkpoint-4"
        train_once(output_dir, **options)


def train_once(
    output_dir: str,
    *,
    full: bool = False,
    kill_at: int | None = None,
    resume: str | None = None,
    stop_behind: int | None = None,
    **options: Any,
) -> None:
    """At step ``kill_at`` the process kills itself; behind step ``stop_behind`` training ends.

    Adam divides a gradient by its size, so one that is zero up to rounding moves a weight by the whole rate. With a
    large epsilon a step is proportional to the gradient, and the weights can be compared.
    """
    settings: dict[str, Any] = {
        "learning_rate": 1e-3 if full else 1.0,
        "adam_epsilon": 1.0,
        "samples_per_prompt": 2,
        "total_episodes": 24,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 8,
        # Every seventh id ends a response: some end, and their scores count; some are cut.
        "stop_token_ids": [2, *range(9, 2048, 7)],
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "whiten_rewards": True,
        "lr_scheduler_type": "linear",
    }
    args = PPOConfig(output_dir=output_dir, **(settings | options))
    peft = None if full else LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    more = {"ptx_dataset": TEXT} if args.ptx_coef else {}
    trainer = PPOTrainer("tiny", args, reward, PROMPTS, eval_dataset=PROMPTS[:5], peft_config=peft, **more)
    if stop_behind is not None:
        trainer.add_callback(StopBehind(stop_behind))
    training_step = trainer.training_step

    def dying(*inputs: Any, **more: Any) -> Any:
        loss = training_step(*inputs, **more)
        if trainer.state.global_step == kill_at:  # gradients are there, the optimiser has not stepped
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    trainer.training_step = dying  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume)
    evaluation = {**trainer.evaluate(), "trained": trainer.spending.tokens}
    state = whole_state(trainer.models)
    if trainer.is_world_process_zero():
        weights = {name: weight.contiguous() for name, weight in state.items()}
        save_file(weights, Path(output_dir) / "state.safetensors")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (Path(output_dir) / "logs.json").write_text(json.dumps([logs, evaluation]))


def whole_state(models: PPOModels) -> dict[str, torch.Tensor]:
    """The trained weights by name. Of sharded models all processes call it, and the main one has them."""
    if not models.sharded:
        return models.trained_state()
    assert isinstance(models, SeparateModels)
    head = models.value_head if models.shares_trunk else None
    parts = {"policy": models.policy, "critic": models.critic, "value_head": head}
    there = {part: full_state(model) for part, model in parts.items() if model is not None}
    return {f"{part}.{name}": weight.clone() for part, state in there.items() for name, weight in state.items()}


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], dict[str, float]]:
    """The weights, the log and the evaluation that :func:`train` wrote."""
    logs, evaluation = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
    return load_file(folder / "state.safetensors"), logs, evaluation


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        train(**settings)
    leave_group()
