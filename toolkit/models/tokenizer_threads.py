"""Whether the tokenizers library uses threads. A process that is forked while they run could wait for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "TOKENIZERS_PARALLELISM"
_OFF = "off"  # the library knows this word as well: a user's own setting is "true" or "false"


def off_by_default() -> None:
    """No threads but inside :func:`threads`, where the user has not set the library's variable."""
    os.environ.setdefault(VARIABLE, _OFF)


@contextmanager
def threads() -> Iterator[None]:
    """Threads inside it, where :func:`off_by_default` holds: nothing is forked there."""
    if os.environ.get(VARIABLE) != _OFF:
        yield
        return
    os.environ[VARIABLE] = "true"
    try:
        yield
    finally:
        os.environ[VARIABLE] = _OFF
