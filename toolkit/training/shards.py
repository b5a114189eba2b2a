"""Training a sharded model: no wrapper around it, and checkpoints into which each process writes its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from toolkit.training.checkpoints import EndsAtLastStep

FOLDER = "shards"
SCHEDULER_FILE = "scheduler.pt"  # transformers' name
# Averages of weights that a checkpoint has beside them, by name.
Averages = Mapping[str, Sequence[torch.Tensor]]


class ShardsTrainer(EndsAtLastStep, Trainer):
    """A Trainer that a subclass may give a sharded model.

    With :attr:`sharded` the subclass writes :meth:`save_shards` in ``save_model``, calls :meth:`keep_out_of_ddp`, and
    leaves loading to this class.
    """

    @property
    def sharded(self) -> nn.Module | None:
        """What is trained and sharded; None where each process has whole weights."""
        raise NotImplementedError

    def averages(self) -> Averages:
        """Averages of the weights, which a checkpoint has too."""
        return {}

    def keep_out_of_ddp(self) -> None:
        """Let accelerate leave the model as it is. It would wrap it in DDP, which holds all weights."""
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def save_shards(self, checkpoint: str) -> None:
        """Write this process's shards of the weights, the optimiser's state and the averages. All processes call it."""
        from torch.distributed.checkpoint.state_dict_saver import (
            save,  # takes long to import, and few models are sharded
        )

        assert self.sharded is not None
        state = _state(self.sharded, self.optimizer, self.averages())
        save(state, checkpoint_id=Path(checkpoint) / FOLDER)

    def load_shards(self, checkpoint: str) -> None:
        """Read what :meth:`save_shards` wrote, also by another number of processes. All processes call it."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        assert self.sharded is not None
        folder = Path(checkpoint) / FOLDER
        state = _state(self.sharded, self.optimizer, self.averages())
        # A weight that had no gradient yet has no state, and one of zeros would count a step that was not taken.
        saved = list(FileSystemReader(folder).read_metadata().state_dict_metadata)
        states = state["optimizer"]["state"]
        for name in [name for name in states if not any(key.startswith(f"optimizer.state.{name}.") for key in saved)]:
            del states[name]
        load(state, checkpoint_id=folder)
        set_state_dict(
            self.sharded,
            _bare(self.optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded is None:  # the weights come with the optimiser's state
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and self.lr_scheduler is not None:
            self.load_shards(checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))


def _state(model: nn.Module, optimizer: Any, averages: Averages) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, _bare(optimizer))
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    for name, tensors in averages.items():
        state[name] = {str(i): tensor for i, tensor in enumerate(tensors)}
    return state


def _bare(optimizer: Any) -> Any:
    """The optimiser without accelerate's wrapper."""
    return optimizer.optimizer
