"""Where the tasks of a sweep or a study run: here, one after the other, or on Ray, all at once.

A task is a function with its arguments. The function gets a reporter behind them. What it does must be idempotent: a
task that died is run again, and so is one whose node was lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from toolkit.errors import BusyError, DuelError, RecipeError, first_line, nearest
from toolkit.models.remote_code import remote_code, remote_code_allowed
from toolkit.progress import Reporter

# What a Ray task asks for where there is no GPU, and where a node has that many.
CPUS_PER_TASK = 2
LONGEST_WAIT_S = 60.0
GIB = 1 << 30


@dataclass(frozen=True)
class TaskResources:
    """What each task asks Ray for. Without ``gpus`` it is a GPU where the cluster has some, without ``cpus`` one core
    beside GPUs and ``CPUS_PER_TASK`` without. Memory is not counted unless ``memory_gib`` is there.
    """

    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float | None = None

    def __bool__(self) -> bool:
        return (self.cpus, self.gpus, self.memory_gib) != (None, None, None)

    def of_ray(self, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Ray's ``num_cpus``, ``num_gpus`` and ``memory`` (bytes) on a cluster of nodes with these resources.

        Raises RecipeError where no node has as much: Ray would wait for such a node for ever.
        """
        gpus = self.gpus if self.gpus is not None else float(any(node.get("GPU", 0) for node in nodes))
        most = min(CPUS_PER_TASK, max(int(node.get("CPU", 0)) for node in nodes))
        cpus = self.cpus if self.cpus is not None else 1 if gpus else most
        if gpus > 1 and gpus != int(gpus):
            what = f"{gpus:g} GPUs are neither whole ones nor a share of one"
            raise RecipeError(what, where="--ray-gpus", fix="a whole number, or one below 1")
        asked = {"CPU": cpus, "GPU": gpus, "memory": (self.memory_gib or 0.0) * GIB}
        if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
            words = f"{cpus:g} CPUs, {gpus:g} GPUs and {self.memory_gib or 0:g} GiB"
            has = "; ".join(
                f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, {node.get('memory', 0) / GIB:.1f} GiB"
                for node in nodes
            )
            raise RecipeError(
                f"no node of the Ray cluster has {words} (it has: {has})",
                where="--ray-cpus, --ray-gpus, --ray-memory",
                fix="ask for less, or add a node",
            )
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": int(gpus) if gpus >= 1 else gpus}
        return options | ({"memory": int(asked["memory"])} if self.memory_gib else {})


def task_resources(values: Mapping[str, float]) -> TaskResources:
    """Resources by their names. Raises RecipeError for another name, or an amount below 0."""
    names = [field.name for field in fields(TaskResources)]
    for name, amount in values.items():
        if name not in names:
            raise RecipeError(f"there is no resource {name!r}", where="resources", fix=nearest(name, names))
        if amount < 0:
            raise RecipeError(f"{name} is {amount:g}", where="resources", fix="0 or more")
    return TaskResources(**values)


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
    """One task after the other, in this process."""

    def run(self, label: str, tasks: Sequence[Task], reporter: Reporter, *, retries: int = 0) -> list[Outcome]:
        outcomes = []
        with reporter.task(label, len(tasks)) as progress:
            for task in tasks:
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
    """All tasks at once on a Ray cluster, as many as have the resources."""

    def __init__(self, ray: Any, resources: TaskResources) -> None:
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # Ray itself runs a task again whose worker or node was lost.
        self.remote = ray.remote(_in_worker).options(**resources.of_ray(nodes), max_retries=-1)

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
        return self.remote.remote(task.function, task.arguments, Path.cwd(), remote_code_allowed())


def _in_worker(
    function: Callable[..., Any], arguments: tuple[Any, ...], cwd: Path, remote_code_runs: bool
) -> tuple[DuelError | None, Any]:
    """A task on Ray. An error that the user can mend is returned, any other is raised."""
    os.chdir(cwd)
    with remote_code(remote_code_runs):
        return _when_free(function, arguments)


def _when_free(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[DuelError | None, Any]:
    """The worker of a node that was lost may hold its folder for a moment longer."""
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
def engine_of(name: str, resources: TaskResources | None = None) -> Iterator[Engine]:
    """The engine of that name: ``local``, or ``ray``.

    ``RAY_ADDRESS`` names a Ray cluster, whose nodes must see the folders under the same paths; without it Ray starts on
    this machine. ``resources`` are those of a task on Ray. Raises RecipeError where Ray is not installed, where no node
    has these resources, and where they are asked for without Ray.
    """
    if name == "local":
        if resources:
            raise RecipeError(
                "tasks ask for resources on Ray alone", where="--ray-cpus, --ray-gpus, --ray-memory", fix="--engine ray"
            )
        yield LocalEngine()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RecipeError("Ray is not installed", where="--engine ray", fix="pip install 'rlhf-duel[ray]'") from None
    ray.init(log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    try:
        yield RayEngine(ray, resources or TaskResources())
    finally:
        ray.shutdown()
