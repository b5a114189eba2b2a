"""What a person watches while a run goes on: bars on a terminal, plain lines elsewhere.

Every message goes to stderr, so that ``--json`` keeps stdout for its one document. The numbers that a stage logs go to
the run folder whether or not anybody watches.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from toolkit.errors import shown
from toolkit.files import atomic_write

PLAIN_LINE_EVERY_S = 10.0
NOTEBOOK_LINE_EVERY_S = 1.0  # one line is written over again and again
METRICS_FILE = "metrics.jsonl"
# Of a stage that samples in training; while it trains it is in its folder TRAINER_FOLDER.
COMPLETIONS_FILE = "completions.jsonl"
TRAINER_FOLDER = "trainer"
# In the run folder: how far the current stage is, for those who watch from another process.
PROGRESS_FILE = ".progress.json"
PROGRESS_EVERY_S = 1.0


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(4.2), duration(185), duration(7620)
    ('4.2s', '3m 05s', '2h 07m')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m {int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h {int(seconds) % 3600 // 60:02d}m"


def rough_duration(seconds: float) -> str:
    """A duration as exact as an estimate is.

    >>> rough_duration(4.2), rough_duration(0.4), rough_duration(185), rough_duration(7620)
    ('4 s', 'under 1 s', '3 min', '2h 07m')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else duration(seconds)


def resident_gib() -> float:
    """What this process holds in memory now: its resident set on Linux, its peak so far elsewhere."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on the other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook: Jupyter's, VS Code's, Colab's."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"


class Display:
    """Lines and bars on stderr. ``prefix`` stands in front of each line.

    A notebook shows stderr as an error. There, lines go to stdout, and the progress is one line that is written over.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.notebook = in_notebook()
        self.written_over = ""  # the line of progress that stands in the notebook now
        self.console = Console(stderr=True, highlight=False)
        self.prefix = ""
        self.shown_once: set[str] = set()
        self.bars: Progress | None = None

    @property
    def line_every_s(self) -> float:
        return NOTEBOOK_LINE_EVERY_S if self.notebook else PLAIN_LINE_EVERY_S

    def line(self, text: str) -> None:
        if self.quiet:
            return
        text = shown(self.prefix + text)
        if self.notebook:
            self.clear()
            print(text, flush=True)
        elif self.console.is_terminal:
            self.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def write_over(self, text: str) -> None:
        """Replace a notebook's line of progress."""
        text = shown(self.prefix + text)
        print("\r" + text.ljust(len(self.written_over)), end="", flush=True)
        self.written_over = text

    def clear(self) -> None:
        """Take a notebook's line of progress away."""
        if self.written_over:
            print("\r" + " " * len(self.written_over) + "\r", end="", flush=True)
            self.written_over = ""

    @contextmanager
    def showing_bars(self) -> Iterator[None]:
        """On a terminal, the tasks that begin inside have bars. Tasks inside a task share its bars."""
        if self.quiet or not self.console.is_terminal or self.bars is not None:
            yield
            return
        with Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[dim]{task.fields[memory]}"),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        ) as self.bars:
            try:
                yield
            finally:
                bars, self.bars = self.bars, None
                bars.stop()


class RunLog:
    """What a run folder records while a stage works: its metrics, and how far it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress_written = -PROGRESS_EVERY_S

    def append(self, stage: str, values: Mapping[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``."""
        record = {"stage": stage, "time": round(time.time(), 3), **values}
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, default=float) + "\n")

    def write_progress(self, state: Mapping[str, Any]) -> None:
        """Replace ``.progress.json``, at most once in ``PROGRESS_EVERY_S``."""
        now = time.monotonic()
        if now - self.progress_written < PROGRESS_EVERY_S:
            return
        self.progress_written = now
        with atomic_write(self.folder / PROGRESS_FILE) as partial:
            partial.write_text(json.dumps({"time": time.time(), **state}), encoding="utf-8")


@dataclass(frozen=True)
class Trackers:
    """The services that get a training stage's numbers too (``report_to`` of the recipe), under ``run_name``-STAGE.

    ``folder`` is where tensorboard's files go.
    """

    names: tuple[str, ...] = ()
    run_name: str = ""
    folder: Path | None = None


class Task:
    """One piece of countable work: ``advance`` it, and the time left is shown."""

    def __init__(self, reporter: Reporter, label: str, total: int) -> None:
        self.reporter, self.label, self.total, self.done = reporter, label, total, 0
        self.started = self.printed = time.monotonic()
        self.first = 0  # work that an earlier, interrupted attempt had done says nothing about the speed now
        self.tokens = 0
        self.speed = ""
        self.note = ""
        bars = reporter.display.bars
        self.bar: TaskID | None = None
        if bars is not None:
            self.bar = bars.add_task(shown(label), total=total, note="", left="", speed="", memory="")

    def resume_at(self, done: int) -> None:
        """An earlier attempt has done ``done`` of the total."""
        self.done = self.first = done
        self.advance(0)

    def advance(self, n: int = 1, note: str = "", tokens: int = 0) -> None:
        """``n`` more are done, which took ``tokens`` tokens if the caller counts them."""
        self.done += n
        self.tokens += tokens
        self.note = note or self.note
        now = time.monotonic()
        new, elapsed = self.done - self.first, now - self.started
        left_s = elapsed / new * (self.total - self.done) if new > 0 and self.done < self.total else None
        left = f"{duration(left_s)} left" if left_s is not None else ""
        if tokens and elapsed:  # they may be counted more rarely than what is done
            self.speed = f"{self.tokens / elapsed:,.0f} tokens/s"
        self.reporter.record_progress(self, left_s)
        display = self.reporter.display
        if display.bars is not None and self.bar is not None:
            fields: dict[str, Any] = {"note": shown(self.note), "left": left, "speed": self.speed}
            display.bars.update(self.bar, completed=self.done, memory=f"{resident_gib():.1f} GiB", **fields)
        elif not display.quiet and now - self.printed >= display.line_every_s:
            self.printed = now
            facts = [f"{self.done}/{self.total}", left, self.speed, f"{resident_gib():.1f} GiB", self.note]
            show = display.write_over if display.notebook else display.line
            show(f"{self.label}: " + "  ".join(filter(None, facts)))


class Reporter:
    """Messages and progress of one command; inside a run, also the run's log and trackers.

    ``stage`` names the stage that it reports on, ``log`` is where its numbers are recorded.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stage: str = "",
        log: RunLog | None = None,
        trackers: Trackers | None = None,
        display: Display | None = None,
    ) -> None:
        self.display = display or Display(quiet=quiet)
        self.stage, self.run_log, self.trackers = stage, log, trackers or Trackers()

    @contextmanager
    def in_stage(
        self, stage: str, *, position: str = "", log: RunLog | None = None, trackers: Trackers | None = None
    ) -> Iterator[Reporter]:
        """The reporter of a stage, whose lines begin with its position and name, as in ``[4/7 ppo]``."""
        self.display.prefix = f"[{position} {stage}] " if position else f"[{stage}] "
        try:
            yield Reporter(stage=stage, log=log, trackers=trackers, display=self.display)
        finally:
            self.display.prefix = ""

    def line(self, text: str) -> None:
        """Show a line of text."""
        self.display.line(text)

    def once(self, text: str) -> None:
        """Show a line that was not shown before, in this run or another of the same command."""
        if text not in self.display.shown_once:
            self.display.shown_once.add(text)
            self.line(text)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Show the progress of ``total`` pieces of work."""
        with self.display.showing_bars():
            try:
                yield Task(self, label, total)
            finally:
                self.display.clear()

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Record numbers of a stage in the run's log."""
        if self.run_log is not None:
            self.run_log.append(stage, values)

    def record_progress(self, task: Task, left_s: float | None) -> None:
        """Record in the run's log how far a task is."""
        if self.run_log is not None:
            state = {"stage": self.stage, "label": task.label, "done": task.done, "total": task.total}
            self.run_log.write_progress({**state, "left_s": left_s, "note": task.note})


def show_notes(reporter: Reporter) -> None:
    """From now on, show what this package logs as notes, and leave out the Python warnings of libraries."""
    logging.getLogger("toolkit").handlers = [NoteHandler(reporter)]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [logging.NullHandler()]


class NoteHandler(logging.Handler):
    """Shows warnings of this package between the lines of a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.line(f"note: {record.getMessage()}")
