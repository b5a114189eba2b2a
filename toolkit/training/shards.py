"""The weights and the optimiser's state of a sharded model in a checkpoint: each process writes its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

FOLDER = "shards"


def save_shards(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Write this process's shards into a checkpoint. All processes call it."""
    save(_state(model, optimizer), checkpoint_id=checkpoint / FOLDER)


def load_shards(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Read what :func:`save_shards` wrote, also by another number of processes. All processes call it."""
    state = _state(model, optimizer)
    load(state, checkpoint_id=checkpoint / FOLDER)
    set_state_dict(model, _bare(optimizer), model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, _bare(optimizer))
    return {"model": of_model, "optimizer": of_optimizer}


def _bare(optimizer: Any) -> Any:
    """The optimiser without accelerate's wrapper."""
    return optimizer.optimizer
