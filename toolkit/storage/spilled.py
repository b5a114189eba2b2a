"""Values that wait on disk, not in memory, until they are asked for."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json

from toolkit.errors import StoreError

BUFFER = 1 << 20  # bytes that wait in memory before they are written
WINDOW = 1 << 14  # bytes that are read at once: values are mostly asked for in their order


class Spill:
    """A list of JSON values in a file that no folder shows. A tuple comes back as a list.

    A value costs 8 bytes of memory. Several threads may read while none adds. The file lies in the folder for temporary
    files, which $TMPDIR names, and is gone when the list is. Raises StoreError where it cannot be written.

    >>> spill = Spill()
    >>> [spill.append(value) for value in ("a", [1, None])], spill[1], len(spill)
    ([0, 1], [1, None], 2)
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as this list
        except OSError as error:
            raise _unwritable(error, os.environ.get("TMPDIR", "")) from error
        self._ends = array("q")
        self._waiting = bytearray()
        self._written = 0
        self._window = (0, b"")  # bytes of the file, and where they begin

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, value: Any) -> int:
        """Add a value; returns its place."""
        try:
            self._waiting += to_json(value, inf_nan_mode="constants")
        except PydanticSerializationError:  # half of a surrogate pair, which UTF-8 cannot hold
            self._waiting += json.dumps(value).encode()
        self._ends.append(self._written + len(self._waiting))
        if len(self._waiting) >= BUFFER:
            self._write()
        return len(self._ends) - 1

    def __getitem__(self, at: int) -> Any:
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        start, end = self._ends[at - 1] if at else 0, self._ends[at]
        if start >= self._written:
            raw = bytes(self._waiting[start - self._written : end - self._written])
        else:
            first, window = self._window
            if not first <= start <= end <= first + len(window):
                first, window = start, os.pread(self._file.fileno(), max(end - start, WINDOW), start)
                self._window = first, window
            raw = window[start - first : end - first]
        try:
            return from_json(raw, cache_strings="keys")
        except ValueError:
            return json.loads(raw)

    def _write(self) -> None:
        try:
            while self._waiting:
                n = os.write(self._file.fileno(), self._waiting)
                self._written += n
                del self._waiting[:n]
        except OSError as error:
            raise _unwritable(error, tempfile.gettempdir()) from error


def _unwritable(error: OSError, folder: str) -> StoreError:
    return StoreError(
        f"a temporary file cannot be written: {error.strerror or error}",
        where=folder or "the folder for temporary files",
        fix="free space there, or let TMPDIR name a folder on another disk",
    )
