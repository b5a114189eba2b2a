"""Whether the tokenizers library uses threads. A process that is forked while they run could wait for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "TOKENIZERS_PARALLELISM"
_OFF = "false"
_OURS = "DUEL_TOKENIZER_THREADS"  # says to processes that inherit the library's variable that a user did not set it


def off_by_default() -> None:
    """No threads but inside :func:`threads`, where the user has not set the library's variable."""
    if VARIABLE not in os.environ:
        os.environ.update({VARIABLE: _OFF, _OURS: "batches"})


@contextmanager
def threads() -> Iterator[None]:
    """Threads inside it, where :func:`off_by_default` holds: nothing is forked there."""
    if os.environ.get(_OURS) != "batches" or os.environ.get(VARIABLE) != _OFF:
        yield
        return
    os.environ[VARIABLE] = "true"
    try:
        yield
    finally:
        os.environ[VARIABLE] = _OFF


def _none_in_a_fork() -> None:
    """A forked process has no threads of its parent's pool, and would wait for them."""
    os.environ.pop(_OURS, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_none_in_a_fork)
