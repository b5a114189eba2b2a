"""What a person watches while a run goes on: bars on a terminal, plain lines elsewhere.

Every message goes to stderr, so that ``--json`` keeps stdout for its one document. Numbers that a
stage logs go to ``metrics.jsonl`` whether or not anybody watches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0


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
        self.note = ""
        self.bar: TaskID | None = None
        if reporter.bars is not None:
            self.bar = reporter.bars.add_task(label, total=total, note="", left="")

    def resume_at(self, done: int) -> None:
        self.done = self.first = done
        self.advance(0)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        fresh = self.done - self.first
        left = (now - self.started) / fresh * (self.total - self.done) if fresh > 0 else None
        text = f"{duration(left)} left" if left is not None and self.done < self.total else ""
        if self.reporter.bars is not None and self.bar is not None:
            self.reporter.bars.update(self.bar, completed=self.done, note=self.note, left=text)
        elif not self.reporter.quiet and now - self.printed >= PLAIN_EVERY_S:
            self.printed = now
            self.reporter.line(f"{self.label}: {self.done}/{self.total}  {text}  {self.note}".rstrip())


class Reporter:
    """Messages, bars and metrics of one command.

    ``overall`` names the stage in hand, as in ``[4/7 ppo]``, in front of each line.
    """

    def __init__(self, *, quiet: bool = False, metrics: Path | None = None) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.metrics = metrics
        self.bars: Progress | None = None
        self.overall = ""
        self.started = time.monotonic()

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
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        ) as self.bars:
            try:
                yield Task(self, label, total)
            finally:
                bars, self.bars = self.bars, None
                bars.stop()

    def log(self, stage: str, values: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``."""
        if self.metrics is None:
            return
        record = {"stage": stage, "time": round(time.time(), 3), **values}
        with self.metrics.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, default=float) + "\n")
