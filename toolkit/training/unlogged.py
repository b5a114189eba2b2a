"""What a trainer has gathered since its last entry of the log, through checkpoints: a resumed one logs the same."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.engine.distributed import all_sum, world
from toolkit.training.checkpoints import checkpoint_folder

LOSS, VALUE = "loss", "value: "


class Unlogged(TrainerCallback):
    """The sum of the losses, the values of each metric and the tokens of this process since the last entry of the log.

    The Trainer counts the losses as well, but its checkpoints do not have them. So :meth:`mean_loss` gives what goes
    into the log, by the Trainer's arithmetic.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.tokens = 0
        self.loss = torch.zeros(())
        self.logged_step = 0

    def add_loss(self, loss: torch.Tensor) -> None:
        """Count what a training step returns to the Trainer."""
        self.loss = self.loss.to(loss.device) + loss.detach()

    def mean_loss(self, step: int) -> float:
        """The mean over processes and steps since the last entry, whose place this step takes."""
        mean: float = (all_sum(self.loss) / world()[1]).item() / (step - self.logged_step)
        self.loss, self.logged_step = torch.zeros_like(self.loss), step
        return mean

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        values = {f"{VALUE}{name}": torch.cat(parts) for name, parts in self.values.items() if parts}
        facts = {"tokens": self.tokens, "logged_step": self.logged_step}
        save_file({LOSS: self.loss, **values}, self._file(args, state), metadata={"facts": json.dumps(facts)})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.global_step:
            self._load(self._file(args, state))

    def _load(self, file: str) -> None:
        with safe_open(file, framework="pt") as saved:
            facts: Mapping[str, int] = json.loads(saved.metadata()["facts"])
            self.tokens, self.logged_step = facts["tokens"], facts["logged_step"]
            self.loss = saved.get_tensor(LOSS)
            for name in sorted(set(saved.keys()) - {LOSS}):
                self.values[name.removeprefix(VALUE)] = [saved.get_tensor(name)]

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> str:
        return str(checkpoint_folder(args, state) / f"unlogged-{world()[0]}.safetensors")
