"""Several processes that share one piece of work, as `accelerate launch` starts them.

In a process that was started alone, every function here returns at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from toolkit.errors import LAUNCHER_FILE
from toolkit.files import is_locked
from toolkit.models.sharding import is_shard, shards

LAUNCHER_CHECK_S = 0.5

Batch = TypeVar("Batch")
Result = TypeVar("Result")
_shares_batches: ContextVar[bool] = ContextVar("shares_batches", default=False)


def launched_processes() -> int:
    """How many processes were started to share the work, whether they have joined each other yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main_process() -> bool:
    """Whether this is the process that writes."""
    rank, size = world()
    return rank == 0 and (size > 1 or launched_processes() == 1 or os.environ.get("RANK", "0") == "0")


def saves_models() -> bool:
    """Whether this process takes part in saving a model: the main one, or each where every one has a shard of it."""
    return main_process() or shards()


def join_group() -> None:
    """Join the other processes, where there are some and this one has not. A Trainer does so itself."""
    end_with_launcher()
    if launched_processes() > 1:
        PartialState(cpu=not torch.cuda.is_available())


@cache  # one thread is enough
def end_with_launcher() -> None:
    """End this process soon after the command that launched it has ended, if only by SIGKILL.

    Without it the processes of a killed run would train on, and write beside the run that follows.
    """
    file = os.environ.get(LAUNCHER_FILE)
    if file is None:
        return

    def watch(path: Path) -> None:
        while is_locked(path):
            time.sleep(LAUNCHER_CHECK_S)
        os._exit(128 + signal.SIGTERM)

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not is_locked(Path(file)):  # the others have ended before this one, whose error is that they are gone
            os._exit(128 + signal.SIGTERM)
        sys.__excepthook__(kind, error, traceback)

    threading.Thread(target=watch, args=(Path(file),), daemon=True).start()
    sys.excepthook = show


def barrier() -> None:
    """Returns when every process is here."""
    if world()[1] > 1:
        dist.barrier()


def world() -> tuple[int, int]:
    """This process's rank, and how many share the work."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave_group() -> None:
    """Wait for the other processes and close the group: gloo aborts a process whose peer has gone."""
    if world()[1] > 1:
        barrier()
        dist.destroy_process_group()


def others_leave() -> bool:
    """Close the group behind shared work. Returns whether this process is the main one, which goes on alone.

    The others do not wait for it: what it does next, such as asking judges, may take hours.
    """
    main = main_process()
    leave_group()
    return main


@contextmanager
def shared_batches() -> Iterator[None]:
    """Inside it, sampling and scoring take turns over the processes, which must all do the same work.

    A batch is what it is in a single process, and each process gets the results of all. So these are the ones of a
    single process, to the last bit where the devices compute alike.
    """
    token = _shares_batches.set(True)
    try:
        yield
    finally:
        _shares_batches.reset(token)


def map_batches(
    batches: Sequence[Batch], compute: Callable[[Batch], Result], done: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """What ``compute`` gives for each batch, in their order; inside :func:`shared_batches` of all processes.

    ``done`` is told of every result.
    """
    rank, size = world() if _shares_batches.get() else (0, 1)
    results: dict[int, Result] = {}
    for number in range(rank, len(batches), size):
        results[number] = compute(batches[number])
        done(results[number])
    if size > 1:
        for number, result in all_items(list(results.items())):
            if number not in results:
                results[number] = result
                done(result)
    return [results[number] for number in range(len(batches))]


def all_sum(total: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes."""
    if world()[1] > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total


def all_max(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if world()[1] == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_items(items: list[Any]) -> list[Any]:
    """The items of all processes, by rank."""
    if world()[1] == 1:
        return items
    gathered: list[list[Any]] = [[] for _ in range(world()[1])]
    dist.all_gather_object(gathered, items)
    return [item for of_rank in gathered for item in of_rank]


def reduce_gradients(model: nn.Module) -> None:
    """Add up gradients over the processes: losses are divided by the totals of all.

    DDP would do so in its wrapper, and our forward passes go through the engine instead. Those of shards are added up
    already, block by block.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad and not is_shard(weight)]
    if world()[1] == 1 or not weights:
        return
    # A weight without a gradient in any process keeps none: to an optimiser with momentum or decay, zero is a gradient.
    n_with = all_sum(torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device))
    for weight, n in zip(weights, n_with.tolist(), strict=True):
        if n:
            gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            dist.all_reduce(gradient)
            weight.grad = gradient
