"""Models whose weights, gradients and optimiser state are sharded over the processes (FSDP2, torch's ``fully_shard``).

A block of the model is gathered for its own computation and let go of behind it. So all processes have to compute the
same number of times: in training, each batch goes :func:`through_root`. What samples or scores computes as often as
its process needs; inside :func:`gathered` the weights are whole in every process.

The unit is a block. All else (embeddings, last norm, head) belongs to the root, since the engine calls the head by
itself, as often as a batch has parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from toolkit.models.inspect import best_device

T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How models are sharded. ``reshard_after_forward`` frees a block behind its forward pass, too."""

    reshard_after_forward: bool = True


_sharding: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


@contextmanager
def sharded_training(sharding: Sharding | None) -> Iterator[None]:
    """Inside it, models that are trained are sharded; with None they are not."""
    token = _sharding.set(sharding)
    try:
        yield
    finally:
        _sharding.reset(token)


def shards() -> bool:
    """Whether models that are trained are sharded here."""
    return _sharding.get() is not None


def loading_device() -> torch.device:
    """Where a model to train is loaded to. One that is to be sharded waits on the CPU until it is :func:`placed`."""
    return torch.device("cpu") if shards() else best_device()


def placed(model: Any) -> Any:
    """The model on this process's device: whole, or this process's shards of it. Weights that train must be fp32."""
    sharding = _sharding.get()
    if sharding is None:
        return model.to(best_device())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(best_device().type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    units = _units(model)
    for before, unit in zip([units[-1], *units], units, strict=False):
        # Losses are divided by the totals of all processes, so gradients add up.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        # By default it follows the order of the last forward passes, which may be sampling's, unlike in each process.
        unit.set_modules_to_backward_prefetch([before])
    model.compute_in_root, model.is_whole = _call, False
    register_fsdp_forward_method(model, "compute_in_root")
    return model


def _call(compute: Callable[[], T]) -> T:
    return compute()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists: a model's layers."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in blocks(child)]


def is_sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _units(model: nn.Module) -> list[Any]:
    """What is gathered at once: the root of a sharded model, which comes first, and its blocks."""
    return [module for module in model.modules() if is_sharded(module)]


def through_root(model: Any, compute: Callable[[], T]) -> T:
    """What ``compute`` returns, called as the forward pass of a model: of a sharded one all processes call it.

    Inside :func:`gathered` it is computed without the others.
    """
    if not is_sharded(model) or model.is_whole:
        return compute()
    result: T = model.compute_in_root(compute)
    if not torch.is_grad_enabled():
        # No backward pass lets go of the weights, which would be old ones behind the next optimiser step.
        for unit in _units(model):
            unit.reshard()
    return result


@contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """Inside it sharded models are whole in every process, and compute without the others. Not for training.

    All processes enter and leave it together.
    """
    with ExitStack() as stack:
        for model in models:
            if is_sharded(model) and not model.is_whole:
                stack.enter_context(_gathered(model))
        yield


@contextmanager
def _gathered(model: Any) -> Iterator[None]:
    units = _units(model)
    model.compute_in_root(lambda: None)  # the first forward pass has to be that of the root
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    model.is_whole = True
    try:
        yield
    finally:
        model.is_whole = False
        sharding = _sharding.get()
        for unit in units:
            unit.reshard()
            frees = sharding is not None and sharding.reshard_after_forward
            unit.set_reshard_after_forward(frees and unit is not model, recurse=False)


def full_state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a model. Of a sharded one it is whole, on the CPU, in the main process, and empty in others."""
    if not is_sharded(model):
        state: dict[str, torch.Tensor] = model.state_dict()
        return state
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    return whole


def written_elsewhere(model: Any) -> bool:
    """Whether the main process writes this model, of which this one has shards."""
    return is_sharded(model) and dist.get_rank() > 0


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether this process has a part of the tensor alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
