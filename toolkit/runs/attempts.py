"""How long a stage has taken over all its attempts, those among them that were killed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import atomic_write, read_json

# What the clock of a killed attempt loses at most.
WRITTEN_EVERY_S = 1.0


class AttemptsClock:
    """Inside of it, ``file`` holds the seconds of all attempts until now: after a kill the next one goes on from there.

    A damaged file counts as none, since no result depends on it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.earlier_s = float(read_json(file)["wall_s"]) if file.is_file() else 0.0
        except (StoreError, KeyError, TypeError, ValueError):
            self.earlier_s = 0.0
        self.started = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._write_until_the_end, daemon=True)

    def seconds(self) -> float:
        """Of all attempts until now."""
        return self.earlier_s + time.monotonic() - self.started

    def __enter__(self) -> AttemptsClock:
        self.started = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._write()

    def _write_until_the_end(self) -> None:
        while not self.ended.wait(WRITTEN_EVERY_S):
            self._write()

    def _write(self) -> None:
        try:
            with atomic_write(self.file) as partial:
                partial.write_text(json.dumps({"wall_s": self.seconds()}), encoding="utf-8")
        except OSError:  # the disk is full or the folder is gone: the stage itself ends with that, and says so
            self.ended.set()
