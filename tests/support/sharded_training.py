"""Full fine-tuning on random pairs, sharded where several processes share it.

``python -m support.sharded_training BATCH FOLDER KIND...``
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.models.sharding import Sharding, full_state, gathered, is_sharded, placed, sharded_training
from toolkit.models.tokenizer import load_tokenizer
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, ModelSection, Training
from toolkit.stages import dpo
from toolkit.training import reward_model
from toolkit.training.batch import Example
from toolkit.training.callbacks import StageProgress
from toolkit.training.checkpoints import last_checkpoint
from toolkit.training.imitation import completion_loss
from toolkit.training.length import total_steps
from toolkit.training.trainer import EngineTrainer, seed_everything, train_to_end, training_arguments

STEPS = 4


@contextmanager
def group_of_one() -> Iterator[None]:
    """Inside it this process is a group by itself, which can shard models."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class StopBehind(TrainerCallback):
    """Ends training behind a step, as a kill does, with the checkpoint of that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == self.step
        control.should_training_stop = state.global_step == self.step


def examples() -> list[Example]:
    """15 prompts: the last batches of an epoch are smaller than the others, or empty."""
    chance = random.Random(0)

    def draw(n: int) -> list[int]:
        return [chance.randrange(10, 500) for _ in range(n)]

    trees = [Tree(draw(chance.randint(2, 9)), [draw(chance.randint(1, 9)) for _ in range(3)]) for _ in range(15)]
    return [Example(tree, [(0, 1, 1.0, 1.0), (1, 2, 0.3, 2.0)]) for tree in trees]


def trainer_of(kind: str, batch: int, out: Path, stop_behind: int = 0) -> tuple[EngineTrainer, StageProgress]:
    """``kind`` is sft, dpo or rm, with ``-bf16`` or ``-checkpointed`` behind it or not."""
    task, _, mode = kind.partition("-")
    items = examples()
    seed_everything(0)
    ref, dtype = resolve("tiny"), "bfloat16" if mode == "bf16" else "float32"
    section = ModelSection(name="tiny", dtype=dtype, lora=None)
    if task == "rm":
        model = placed(trainable(new_reward_model(ref, section, 0, seed=1), None, task="SEQ_CLS"))
    else:
        model = placed(trainable(load_policy(ref, section, dtype=torch.float32), None, task="CAUSAL_LM"))
    # Few tokens in a microbatch: processes have different numbers of them.
    engine = Engine(model, 0, dtype=getattr(torch, dtype), token_budget=40)
    loss: Any = partial(completion_loss, engine)
    if task == "dpo":
        with gathered(model):
            reference = [torch.stack([t.sum() for t in row]) for row in engine.logps([item.tree for item in items])]
        loss = partial(dpo.dpo_loss, engine, DpoSection(), reference)
    elif task == "rm":
        loss = partial(reward_model.bradley_terry, engine, 0.01)
    # With a large epsilon an Adam step is proportional to the gradient; the norm is clipped in each step.
    settings = Training(
        learning_rate=0.5, adam_epsilon=1.0, per_device_train_batch_size=batch, max_steps=STEPS, logging_steps=1,
        gradient_accumulation_steps=2, max_grad_norm=0.5, gradient_checkpointing=mode == "checkpointed",
    )  # fmt: skip
    progress = StageProgress(Reporter(quiet=True), task, total_steps(settings, len(items)))
    arguments = training_arguments(settings, out, seed=0, dtype=dtype, steps=STEPS)
    callbacks = [progress, *([StopBehind(stop_behind)] if stop_behind else [])]
    return EngineTrainer(engine, arguments, items, loss, callbacks), progress


def train(kind: str, batch: int, out: Path, *, interrupted: bool = False) -> None:
    """Writes the weights and the logs into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    if interrupted:
        trainer, progress = trainer_of(kind, batch, out, stop_behind=2)
        train_to_end(trainer, progress, out)
        assert str(last_checkpoint(out)).endswith("checkpoint-2")
    trainer, progress = trainer_of(kind, batch, out)
    train_to_end(trainer, progress, out)
    model = trainer.engine.model
    if distributed.world()[1] > 1:
        assert is_sharded(model)
        size = sum(weight.to_local().numel() for weight in model.parameters())
        whole = sum(weight.numel() for weight in model.parameters())
        assert size < 0.6 * whole  # each process has its half, up to weights that do not divide
    sampled = []
    if not kind.startswith("rm"):  # the main process samples more than the other does
        n = 3 - distributed.world()[0]
        with gathered(model):
            groups = sample_responses(
                model.eval(), load_tokenizer(resolve("tiny")), [item.tree.prompt_ids for item in trainer.examples[:n]],
                lambda i, k: (i, k), SamplingParams(8), dtype=trainer.engine.dtype,
            )  # fmt: skip
        sampled = [response.ids for group in groups for response in group]
    state = full_state(model)
    if distributed.main_process():
        save_file({name: weight.clone().contiguous() for name, weight in state.items()}, out / "state.safetensors")
        (out / "logs.json").write_text(json.dumps(progress.history))
        (out / "sampled.json").write_text(json.dumps(sampled))


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join_group()
    frees = sys.argv[3] == "frees"
    for name in sys.argv[4:]:
        kind, _, interrupted = name.partition("+")
        with sharded_training(Sharding(reshard_after_forward=frees)):
            train(kind, int(sys.argv[1]), Path(sys.argv[2]) / name, interrupted=bool(interrupted))
    distributed.leave_group()
