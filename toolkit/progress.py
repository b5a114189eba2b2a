"""What a person watches while a run goes on: bars on a terminal, plain lines elsewhere.

Every message goes to stderr, so that ``--json`` keeps stdout for its one document. Numbers that a
stage logs go to ``metrics.jsonl`` whether or not anybody watches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0
# How far the stage in hand is, in its run folder, for those who watch from another process.
PROGRESS_FILE = ".progress.json"
PROGRESS_EVERY_S = 1.0


def duration(seconds: float) -> str:
    """``"4.2s"``, ``"3m 05s"``, ``"2h 07m"``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m {int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h {int(seconds) % 3600 // 60:02d}m"


class Task:
    """One piece of countable work: ``advance`` it, and time left is shown."""

    def __init__(self, reporter: Reporter, label: str, total: int) -> None:
        self.reporter, self.label, self.total, self.done = reporter, label, total, 0
        self.started = self.printed = time.monotonic()
        self.first = 0  # work that an earlier, interrupted attempt had done says nothing about speed now
        self.tokens = 0
        self.speed = ""
        self.note = ""
        self.bar: TaskID | None = None
        if reporter.bars is not None:
            self.bar = reporter.bars.add_task(label, total=total, note="", left="", speed="", memory="")

    def resume_at(self, done: int) -> None:
        self.done = self.first = done
        self.advance(0)

    def advance(self, n: int = 1, note: str = "", tokens: int = 0) -> None:
        """``n`` more are done, ``tokens`` behind them where somebody counts tokens."""
        self.done += n
        self.tokens += tokens
        self.note = note or self.note
        now = time.monotonic()
        fresh, elapsed = self.done - self.first, now - self.started
        left_s = elapsed / fresh * (self.total - self.done) if fresh > 0 and self.done < self.total else None
        left = f"{duration(left_s)} left" if left_s is not None else ""
        if tokens and elapsed:  # they may be counted more rarely than what is done
            self.speed = f"{self.tokens / elapsed:,.0f} tokens/s"
        self.reporter.leave_word(self, left_s)
        if self.reporter.bars is not None and self.bar is not None:
            memory = f"{resident_gib():.1f} GiB"
            fields = {"note": self.note, "left": left, "speed": self.speed, "memory": memory}
            self.reporter.bars.update(self.bar, completed=self.done, **fields)
        elif not self.reporter.quiet and now - self.printed >= PLAIN_EVERY_S:
            self.printed = now
            facts = [f"{self.done}/{self.total}", left, self.speed, f"{resident_gib():.1f} GiB", self.note]
            self.reporter.line(f"{self.label}: " + "  ".join(filter(None, facts)))


def resident_gib() -> float:
    """What this process holds in memory now: its resident set on Linux, its peak so far elsewhere."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on the other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Reporter:
    """Messages, bars and metrics of one command.

    ``overall`` names the stage in hand, as in ``[4/7 ppo]``, in front of each line. ``trackers`` are who else hears of
    a training stage's numbers (``report_to`` of the recipe), under the name ``run_name``-STAGE.
    """

    def __init__(self, *, quiet: bool = False, metrics: Path | None = None) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.metrics = metrics
        self.bars: Progress | None = None
        self.overall = ""
        self.trackers: tuple[str, ...] = ()
        self.run_name = ""
        self.left_word = -PROGRESS_EVERY_S

    def line(self, text: str) -> None:
        if self.quiet:
            return
        prefix = f"[{self.overall}] " if self.overall else ""
        if self.console.is_terminal:
            self.console.print(prefix + text, markup=False)
        else:
            print(prefix + text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        if self.quiet or not self.console.is_terminal or self.bars is not None:
            yield Task(self, label, total)
            return
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[dim]{task.fields[memory]}"),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        ) as self.bars:
            try:
                yield Task(self, label, total)
            finally:
                bars, self.bars = self.bars, None
                bars.stop()

    def leave_word(self, task: Task, left_s: float | None) -> None:
        """Write down how far the task is, at most once in PROGRESS_EVERY_S, beside ``metrics``."""
        now = time.monotonic()
        if self.metrics is None or now - self.left_word < PROGRESS_EVERY_S:
            return
        self.left_word = now
        state = {"stage": self.overall.rpartition(" ")[2], "time": time.time(), "label": task.label}
        state |= {"done": task.done, "total": task.total, "left_s": left_s, "note": task.note}
        path = self.metrics.with_name(PROGRESS_FILE)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(path)

    def log(self, stage: str, values: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``."""
        if self.metrics is None:
            return
        record = {"stage": stage, "time": round(time.time(), 3), **values}
        with self.metrics.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, default=float) + "\n")
