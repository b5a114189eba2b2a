"""One process at a time: locks that name who holds them, for run folders and for the files that commands write.

A lock is the system's (``flock``): it ends with its process, however that ends. So a file that a killed process left
holds nothing, whatever it says.
"""

from __future__ import annotations

import glob
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from toolkit.errors import BusyError
from toolkit.files import UNFINISHED, locked, refuse_below_file, refuse_place, remove_partials

P = ParamSpec("P")
R = TypeVar("R")
LONGEST_COMMAND = 300


@contextmanager
def held(lock: Path, what: str, where: Path, *, fix: str) -> Iterator[bool]:
    """Hold a lock file, which says by whom, since when and for which command.

    Gives whether the same command held it before and was killed. Raises BusyError with ``what`` another process does
    ``where``, and who that is.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError as error:
            raise BusyError(f"another process {what}{holder(lock)}", where=str(where), fix=fix) from error
        before = _signature(lock).get("command")
        _sign(lock)
        yield before == _command()


def _command() -> list[str]:
    return ["duel", *sys.argv[1:]]


def _sign(lock: Path) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": _command()}
    with lock.open("r+", encoding="utf-8") as file:  # the file that is locked, not another in its place
        file.truncate()
        json.dump(facts, file)


def _signature(lock: Path) -> dict[str, Any]:
    try:
        facts = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def holder(lock: Path) -> str:
    """Who signed a lock file, in words; "" where that cannot be read."""
    facts = _signature(lock)
    if not {"pid", "host", "since", "command"} <= facts.keys():
        return ""
    command = " ".join(map(str, facts["command"]))[:LONGEST_COMMAND]
    return f" (process {facts['pid']} on {facts['host']} since {facts['since']}: {command})"


@contextmanager
def writing(out: Path) -> Iterator[bool]:
    """Hold the file or folder that a command writes. Its folder is made.

    Gives whether the same command was killed here, after it may have written ``out``: then that is replaced without
    --force. Raises BusyError where another command writes it, StoreError where its folder is a file.
    """
    place = out if out.name not in ("", "..") else out.resolve()
    refuse_below_file(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with held(lock, "writes this file", out, fix="wait for it, or choose another --out") as resumed:
        try:
            remove_partials(place.parent, f".{glob.escape(place.name)}.*.partial")
            if resumed:
                UNFINISHED.add(out)
            yield resumed
        finally:
            UNFINISHED.discard(out)
            lock.unlink(missing_ok=True)


def holds_out(function: Callable[P, R]) -> Callable[P, R]:
    """A function that holds the file of its argument ``out`` (:func:`writing`), which must not be a folder.

    Of launched processes the first one does.
    """

    @wraps(function)
    def holding(*args: P.args, **options: P.kwargs) -> R:
        out = options["out"]
        assert isinstance(out, Path)
        refuse_place(out)
        with writing(out) if os.environ.get("RANK", "0") == "0" else nullcontext():
            return function(*args, **options)

    return holding


@contextmanager
def in_turn(lock: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file as soon as its holder lets go of it. ``waiting`` gets a line where that is not at once."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(lock, "asks the same questions", lock, fix=""))
                break
            except BusyError as error:
                if not said:
                    waiting(f"{error.what}: waiting for its answers")
                said = True
                time.sleep(0.2)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
