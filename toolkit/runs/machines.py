"""A run over several machines: the main one runs, the others join each stage that it launches.

Every machine has the same command, with its own ``--machine_rank``, and sees the run folder under the same path. The
main machine says in a file of the run folder which stage it launches; the others launch it too, and accelerate's
rendezvous brings the processes together.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError
from toolkit.files import read_json, write_json
from toolkit.progress import Reporter
from toolkit.runs.launch import Launch, accelerate_launch
from toolkit.runs.store import RunFolder

MACHINES_FILE = ".machines.json"
CHECK_S = 0.5


@contextmanager
def leading(root: Path, launch: Launch) -> Iterator[None]:
    """Inside it the other machines of a launch join what :func:`announce` names, and behind it they end."""
    if launch.machines == 1:
        yield
        return
    write_json(root / MACHINES_FILE, {"session": uuid.uuid4().hex, "launches": 0, "request": None, "ended": None})
    ended = "failed"
    try:
        yield
        ended = "done"
    finally:
        write_json(root / MACHINES_FILE, read_json(root / MACHINES_FILE) | {"ended": ended})


def announce(root: Path, request: Path, launch: Launch) -> None:
    """Let the other machines launch the stage of this request, too."""
    if launch.machines > 1:
        state = read_json(root / MACHINES_FILE)
        state |= {"launches": state["launches"] + 1, "request": str(request.resolve().relative_to(root.resolve()))}
        write_json(root / MACHINES_FILE, state)


def follow(root: Path, arguments: Sequence[str], launch: Launch, reporter: Reporter) -> None:
    """On another machine than the main one: join its stages until it has ended.

    Raises StoreError where the run failed there, or its command was killed.
    """
    folder, rank = RunFolder(root), f"machine {launch.machine_rank} of {launch.machines}"
    reporter.line(f"{rank}: it joins the stages of the run on machine 0, which tells how far they are")
    state, joined = _state(root), 0  # read before the lock is looked at: whoever takes that later writes another state
    over = state.get("ended") is not None or not folder.busy()
    earlier = state.get("session") if over else None
    while _state(root).get("session") in (None, earlier):
        time.sleep(CHECK_S)
    while True:
        running, state = folder.busy(), _state(root)
        if state["ended"] is not None or not running:
            break
        elif state["launches"] > joined:
            joined = state["launches"]
            accelerate_launch(arguments, "toolkit.stages", [str((root / state["request"]).resolve())])
        else:
            time.sleep(CHECK_S)
    if state["ended"] != "done":
        raise StoreError("the run on machine 0 did not come to its end", where=rank, fix="see its messages there")


def _state(root: Path) -> dict[str, Any]:
    return read_json(root / MACHINES_FILE) if (root / MACHINES_FILE).is_file() else {}
