"""One malformed input: the files that it consists of, the command that reads them, and what the command must say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from toolkit.cli.main import exit_code

Make = Callable[[Path], None]
SECONDS = 30.0  # a reader that takes longer hangs
MEBIBYTES = 1500  # no input may take more memory than this beside what the process has
READ, REFUSED = 0, 2


@dataclass(frozen=True)
class Malformed:
    """``command`` runs in a folder that has ``files`` and what ``make`` writes. It has to be refused, if not ``code``.

    ``words`` are in the message. ``outputs`` may not be there afterwards.
    """

    name: str
    command: str
    files: dict[str, bytes] = field(default_factory=dict)
    make: Make | None = None
    code: int = REFUSED
    words: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("out", "out.parquet", "out.jsonl.gz")
    heavy: bool = False  # takes seconds or much memory even where all is well


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (None where it did not end in time), its words, and what is wrong with it."""

    code: int | None
    message: str
    seconds: float
    mebibytes: float
    faults: tuple[str, ...]


class _OutOfTimeError(BaseException):
    """The command takes too long; no handler of the command's own may catch this."""


def run_malformed(case: Malformed, folder: Path) -> Outcome:
    """Write the input into ``folder``, run its command in this process, and judge what it did."""
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if case.make is not None:
        case.make(folder)
    code, message, seconds, mebibytes = _run(case.command.split("|"), folder)
    faults = []
    if code is None:
        faults.append(f"it did not end in {SECONDS:.0f} s")
    elif code != case.code:
        faults.append(f"exit code {code}, not {case.code}")
    if "internal error" in message or "Traceback" in message:
        faults.append("an internal error")
    if case.code == REFUSED and code == REFUSED:
        faults += _of_message(message)
        faults += [f"{name} is left there" for name in case.outputs if _looks_whole(folder / name)]
    faults += [f"the message lacks {word!r}" for word in case.words if word not in message]
    if mebibytes > MEBIBYTES:
        faults.append(f"it took {mebibytes:.0f} MiB")
    return Outcome(code, message, seconds, mebibytes, tuple(faults))


def _of_message(message: str) -> list[str]:
    """What is wrong with the message of a refusal: there is one, it is short enough to read, and it says where."""
    faults = []
    errors = [line for line in message.splitlines() if line.startswith(("error:", "Error:", "Usage:"))]
    if not errors:
        faults.append("no message")
    elif message.count("\nerror: ") + message.startswith("error: ") > 1:
        faults.append("several messages")
    elif errors[0].startswith("error:") and "where: " not in message:
        faults.append("the message has no place")
    if len(message) > 20_000:
        faults.append(f"a message of {len(message)} characters")
    return faults


def _looks_whole(path: Path) -> bool:
    """Whether an output is there: a file, or a folder with a file that is not a lock."""
    if path.is_dir():
        return any(file.is_file() and file.stat().st_size for file in path.rglob("*") if ".work" not in file.parts)
    return path.exists()


def _run(words: list[str], folder: Path) -> tuple[int | None, str, float, float]:
    out, before, start = io.StringIO(), os.getcwd(), time.monotonic()
    _forget_peak()
    resident = _memory("VmRSS")
    code: int | None
    try:
        os.chdir(folder)
        with (
            mock.patch.object(sys, "argv", ["duel", "-q", *words]),
            mock.patch.dict(os.environ, {"DUEL_CACHE": str(folder / "cache")}),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(out),
            _time_limit(),
        ):
            code = exit_code()
    except _OutOfTimeError:
        code = None
    finally:
        os.chdir(before)
    return code, out.getvalue(), time.monotonic() - start, _memory("VmHWM") - resident


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _OutOfTimeError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def _memory(name: str) -> float:
    """MiB of this process now (VmRSS) or at its peak (VmHWM); 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------- contents


def jsonl(*rows: object) -> bytes:
    """JSON lines; a text or bytes stand as they are."""
    return b"".join(
        (row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()) + b"\n"
        for row in rows
    )


def parquet(*rows: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()
