"""Reward models and DPO in two processes: the steps, the losses and the weights of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.invariant

# As in PPO's: with a large epsilon an Adam step is proportional to the gradient, and the weights can be compared.
SCRIPT = """
import json, random, sys
from functools import partial
from pathlib import Path
import torch
from safetensors.torch import save_file
from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.recipe.schema import DpoSection, Lora, ModelSection, Training
from toolkit.stages import dpo, reward_model
from toolkit.training.batch import Example
from toolkit.training.trainer import EngineTrainer, seed_everything, total_steps, training_arguments

torch.set_num_threads(1)
kind, batch, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
chance = random.Random(0)
draw = lambda n: [chance.randrange(10, 500) for _ in range(n)]
trees = [Tree(draw(chance.randint(2, 9)), [draw(chance.randint(1, 9)) for _ in range(3)]) for _ in range(16)]
items = [Example(tree, [(0, 1, 1.0, 1.0), (1, 2, 0.3, 2.0)]) for tree in trees]
seed_everything(0)
ref, section = resolve("tiny"), ModelSection(name="tiny", dtype="float32", lora=Lora(r=4, alpha=8))
if kind == "dpo":
    model = trainable(load_policy(ref, section), section.lora, task="CAUSAL_LM")
else:
    model = new_reward_model(ref, section, 0, seed=1)
    model = trainable(model, section.lora, task="SEQ_CLS", modules_to_save=["score"])
engine = Engine(model, 0, dtype=torch.float32)
if kind == "dpo":
    reference = [torch.stack([t.sum() for t in row]) for row in engine.logps(trees)]
    loss = partial(dpo.dpo_loss, engine, DpoSection(), reference)
else:
    loss = partial(reward_model.bradley_terry, engine, 0.01)
settings = Training(
    learning_rate=1.0, adam_epsilon=1.0, per_device_train_batch_size=batch, num_train_epochs=2, logging_steps=1,
    gradient_accumulation_steps=2,
)
steps = total_steps(settings, len(items))
arguments = training_arguments(settings, out, seed=0, dtype="float32", steps=steps)
trainer = EngineTrainer(engine, arguments, items, loss)
trainer.train()
if distributed.main_process():
    weights = {n: w.detach().contiguous() for n, w in model.named_parameters() if w.requires_grad}
    save_file(weights, out / "state.safetensors")
    (out / "logs.json").write_text(json.dumps([log for log in trainer.state.log_history if "loss" in log]))
distributed.leave_group()
"""


def run(folder: Path, kind: str, batch: int, processes: int) -> tuple[Any, Any]:
    script = folder.parent / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), kind, str(batch), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "state.safetensors"), json.loads((folder / "logs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["dpo", "rm"])
def test_two_processes_equal_one_with_twice_the_batch(kind: str, tmp_path: Path) -> None:
    one, ones = run(tmp_path / "one", kind, 4, 1)
    two, twos = run(tmp_path / "two", kind, 2, 2)
    assert len(ones) == len(twos) == 4  # two epochs over 16 prompts, 8 of them in a step
    # Not the accuracies: at the first step the rewards are all equal, up to rounding.
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "tokens"]
    for log, same in zip(ones, twos, strict=True):
        assert {n: log[n] for n in names} == pytest.approx({n: same[n] for n in names}, rel=1e-4, abs=1e-5)
    moved = max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name)
    assert moved > 1e-4 and one.keys() == two.keys()
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-4 * moved, name
