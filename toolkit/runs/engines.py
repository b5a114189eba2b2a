"""Where the tasks of a sweep or a study run: here, one after the other, or on Ray, all at once.

A task is a function with its arguments. The function gets a reporter behind them. What it does must be idempotent: a
task that died is run again, and so is one whose node was lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from toolkit.errors import BusyError, DuelError, RecipeError, first_line
from toolkit.progress import Reporter

# What a Ray task asks for where there is no GPU, and where a node has that many.
CPUS_PER_TASK = 2
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Task:
    """A piece of work with a name for people."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What a task returned, or why it died after all its attempts."""

    value: Any = None
    died: str | None = None


class Engine(Protocol):
    """Runs tasks; the outcomes are in the order of the tasks. Raises the first DuelError that a task raises."""

    def run(self, label: str, tasks: Sequence[Task], reporter: Reporter, *, retries: int = 0) -> list[Outcome]: ...


class LocalEngine:
    """One task after the other, in this process. ``before_task`` is called before a task's code is imported."""

    def __init__(self, before_task: Callable[[], None] = lambda: None) -> None:
        self.before_task = before_task

    def run(self, label: str, tasks: Sequence[Task], reporter: Reporter, *, retries: int = 0) -> list[Outcome]:
        outcomes = []
        with reporter.task(label, len(tasks)) as progress:
            for task in tasks:
                self.before_task()
                outcomes.append(self._attempt(task, reporter, retries))
                progress.advance(note=task.label)
        return outcomes

    def _attempt(self, task: Task, reporter: Reporter, retries: int) -> Outcome:
        for attempt in range(retries + 1):
            try:
                return Outcome(task.function(*task.arguments, reporter))
            except DuelError as error:
                raise _in_task(error, task) from error
            except Exception as error:  # of any library below: the study goes on without this task
                reason = f"{type(error).__name__}: {first_line(error)}"
                _say_died(task, reason, attempt, retries, reporter)
        return Outcome(died=reason)


def _say_died(task: Task, reason: str, attempt: int, retries: int, reporter: Reporter) -> None:
    then = "it is tried again" if attempt < retries else "it is given up"
    reporter.line(f"{task.label} died ({reason}): {then}")


def _in_task(error: DuelError, task: Task) -> DuelError:
    return type(error)(error.what, where=f"{task.label}: {error.where}" if error.where else task.label, fix=error.fix)


class RayEngine:
    """All tasks at once on a Ray cluster. Each takes a GPU where the cluster has some, and cores where not."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = any(node.get("GPU", 0) for node in nodes)
        cpus = 1 if gpus else min(CPUS_PER_TASK, max(int(node.get("CPU", 0)) for node in nodes))
        # Ray itself runs a task again whose worker or node was lost.
        self.remote = ray.remote(_in_worker).options(num_gpus=int(gpus), num_cpus=cpus, max_retries=-1)

    def run(self, label: str, tasks: Sequence[Task], reporter: Reporter, *, retries: int = 0) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        running = {self._start(task): (number, 0) for number, task in enumerate(tasks)}
        with reporter.task(label, len(tasks)) as progress:
            while running:
                [done], _ = self.ray.wait(list(running))
                number, attempt = running.pop(done)
                task = tasks[number]
                try:
                    problem, value = self.ray.get(done)
                except self.ray.exceptions.RayError as error:
                    reason = first_line(getattr(error, "cause", None) or error)
                    _say_died(task, reason, attempt, retries, reporter)
                    if attempt < retries:
                        running[self._start(task)] = (number, attempt + 1)
                        continue
                    problem, value = None, None
                    outcomes[number] = Outcome(died=reason)
                if problem is not None:
                    raise _in_task(problem, task)
                outcomes.setdefault(number, Outcome(value))
                progress.advance(note=task.label)
        return [outcomes[number] for number in range(len(tasks))]

    def _start(self, task: Task) -> Any:
        return self.remote.remote(task.function, task.arguments, Path.cwd())


def _in_worker(function: Callable[..., Any], arguments: tuple[Any, ...], cwd: Path) -> tuple[DuelError | None, Any]:
    """A task on Ray. An error that the user can mend is returned, any other is raised.

    The worker of a node that was lost may hold its folder for a moment longer.
    """
    os.chdir(cwd)
    deadline = time.monotonic() + LONGEST_WAIT_S
    while True:
        try:
            return None, function(*arguments, Reporter(quiet=True))
        except BusyError as error:
            if time.monotonic() > deadline:
                return error, None
            time.sleep(1.0)
        except DuelError as error:
            return error, None


@contextmanager
def engine_of(name: str, before_task: Callable[[], None] = lambda: None) -> Iterator[Engine]:
    """The engine of that name: ``local``, or ``ray``.

    ``RAY_ADDRESS`` names a Ray cluster, whose nodes must see the folders under the same paths; without it Ray starts on
    this machine. Raises RecipeError where Ray is not installed.
    """
    if name == "local":
        yield LocalEngine(before_task)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RecipeError("Ray is not installed", where="--engine ray", fix="pip install 'rlhf-duel[ray]'") from None
    ray.init(log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    try:
        yield RayEngine(ray)
    finally:
        ray.shutdown()
