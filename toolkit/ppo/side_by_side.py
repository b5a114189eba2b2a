"""Two passes at once on a CPU, each on half of its threads.

A pass through a small model is thousands of operations, many too short for all threads to share well: each waits for
the slowest. Two passes that need nothing of each other (a policy's and its critic's) leave fewer to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


def can(device: torch.device) -> bool:
    """Whether there are threads to share out."""
    return device.type == "cpu" and torch.get_num_threads() > 1


def both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """What the two return, under the caller's autocast and gradient mode. They must not change what the other reads.

    Each is computed with half of the threads, so that its result depends on their number, and on nothing else.
    """
    threads = torch.get_num_threads()
    half = max(1, threads // 2)
    gradients = torch.is_grad_enabled()
    autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))

    def beside() -> Second:  # all of these settings are a thread's own
        torch.set_num_threads(half)
        with torch.set_grad_enabled(gradients), autocast:
            return second()

    torch.set_num_threads(half)
    try:
        other = _worker().submit(beside)
        try:
            result = first()
        finally:
            other.exception()  # not before both are done: the second would go on, on threads that are the caller's
        return result, other.result()
    finally:
        torch.set_num_threads(threads)


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="duel-side-by-side")
