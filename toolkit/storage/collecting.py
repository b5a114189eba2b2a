"""Python's collector of garbage, while many values are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_left_out() -> Iterator[None]:
    """Inside it the collector looks at what was made since: else it looks through all imported modules again and again.

    That takes a fifth of the time of a loop that makes a record of each row.
    """
    if gc.get_freeze_count():  # someone else's, who thaws all at once
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
