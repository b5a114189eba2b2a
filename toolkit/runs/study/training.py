"""Training a study's trials: stage after stage, each stage that several trials share once.

A trial whose training diverges is a result of its setting. One that dies is tried again, and then counts as diverged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import DivergedError
from toolkit.files import read_json, write_json
from toolkit.progress import Reporter
from toolkit.runs import pipeline
from toolkit.runs.engines import Engine, Outcome, Task
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.plan import STAGE_NAMES, PlannedStage, plan_stages, with_inputs
from toolkit.runs.store import FAILURE_FILE, RunFolder
from toolkit.runs.study.trials import Trial
from toolkit.runs.sweep import others_of

# Both arms start from these stages: without them there is no study.
SHARED_STAGES = ("data", "sft")


@dataclass(frozen=True)
class Failure:
    """Why a trial has no policy. ``kind`` is ``diverged`` or ``died``; ``key`` is that of the stage that failed."""

    kind: str
    reason: str
    key: str

    def __str__(self) -> str:
        return self.reason if self.kind == "diverged" else f"it died: {self.reason}"


@dataclass(frozen=True)
class StageTasks:
    """A stage of the trials that have it: those that run it (one for each key), and those that take it over."""

    stage: str
    leaders: list[tuple[Trial, PlannedStage]]
    followers: list[tuple[Trial, PlannedStage]]

    @property
    def waiting(self) -> list[tuple[Trial, PlannedStage]]:
        """Leaders whose stage is not there yet."""
        return [(trial, planned) for trial, planned in self.leaders if planned.state.status != "cached"]


def stage_tasks(trials: Sequence[Trial], stage: str) -> StageTasks:
    """The stage in those trials that need it."""
    leaders: dict[str, tuple[Trial, PlannedStage]] = {}
    followers = []
    for trial in trials:
        stages = plan_stages(trial.loaded, RunFolder(trial.folder))
        if stage not in {name for target in trial.targets for name in with_inputs(stages, target)}:
            continue
        [planned] = (planned for planned in stages if planned.spec.name == stage)
        first = leaders.setdefault(planned.key, (trial, planned))
        if first[0] is not trial:
            followers.append((trial, planned))
    return StageTasks(stage, list(leaders.values()), followers)


def train(
    trials: Sequence[Trial],
    engine: Engine,
    reporter: Reporter,
    *,
    retries: int,
    others: Sequence[Trial] = (),
    command: Sequence[str] = (),
) -> dict[str, Failure]:
    """Train every trial. Returns the failures by the trial's name.

    Equal stages of ``others`` are taken over. ``command`` is recorded in the trials' manifests. Raises what a shared
    stage raises, and DuelError for what the user can mend.
    """
    failures: dict[str, Failure] = {}
    for stage in STAGE_NAMES:
        tasks = stage_tasks([trial for trial in trials if trial.name not in failures], stage)
        failed_before = {
            p.key: f for t, p in tasks.leaders if (f := recorded_failure(t, p.key)) and f.kind == "diverged"
        }
        waiting = [(trial, planned) for trial, planned in tasks.waiting if planned.key not in failed_before]
        if waiting:
            n_all = len(tasks.leaders) + len(tasks.followers)
            reporter.line(f"{stage}: {len(waiting)} to run, for {n_all} trials")
        outcomes = engine.run(stage, _as_tasks(waiting, stage, [*trials, *others], command), reporter, retries=retries)
        failed = failed_before | dict(_failed(waiting, outcomes))
        for trial, planned in [*tasks.leaders, *tasks.followers]:
            if planned.key in failed:
                failures[trial.name] = failed[planned.key]
                write_json(trial.folder / FAILURE_FILE, vars(failed[planned.key]))
        taking_over = [
            (trial, planned)
            for trial, planned in tasks.followers
            if stage in trial.targets and planned.state.status != "cached" and planned.key not in failed
        ]
        engine.run(f"{stage}, taken over", _as_tasks(taking_over, stage, [*trials, *others], command), reporter)
    return failures


def _as_tasks(
    planned: Iterable[tuple[Trial, PlannedStage]], stage: str, trials: Sequence[Trial], command: Sequence[str]
) -> list[Task]:
    tasks = []
    for trial, _ in planned:
        n = max(other.number for other in trials if other.arm == trial.arm)
        tasks.append(Task(trial.label, train_until, (trial, n, stage, others_of(trial, trials), command)))
    return tasks


def train_until(
    trial: Trial, n_settings: int, stage: str, others: list[Path], command: Sequence[str], reporter: Reporter
) -> str | None:
    """A task: the trial, one of ``n_settings`` of its arm, up to a stage. Returns None, or why training diverged."""
    reporter.line(heading(trial, n_settings))
    options = RunOptions(target=stage, reuse=others, say_reused=False, command=command)
    try:
        pipeline.run(trial.loaded, trial.folder, reporter, options)
    except DivergedError as error:
        if stage in SHARED_STAGES:
            raise
        reporter.line(f"{trial.label}: {error.what}")
        return error.what
    return None


def heading(trial: Trial, n_settings: int) -> str:
    """The line above what a trial does, as in ``[rm_ppo 2/4, seed 1] kl_coef=0.05``."""
    number = f" {trial.number}/{n_settings}" if n_settings > 1 else ""
    setting = f" {trial.setting}" if trial.setting != trial.arm else ""
    return f"[{trial.arm}{number}, seed {trial.seed}]{setting}"


def _failed(
    waiting: Sequence[tuple[Trial, PlannedStage]], outcomes: Sequence[Outcome]
) -> Iterable[tuple[str, Failure]]:
    for (trial, planned), outcome in zip(waiting, outcomes, strict=True):
        if outcome.died is not None and planned.spec.name in SHARED_STAGES:
            raise RuntimeError(f"{trial.label}: stage {planned.spec.name} died: {outcome.died}")
        if outcome.died is not None:
            yield planned.key, Failure("died", outcome.died, planned.key)
        elif outcome.value is not None:
            yield planned.key, Failure("diverged", outcome.value, planned.key)


def recorded_failure(trial: Trial, key: str) -> Failure | None:
    """The failure of an earlier call with the same settings and code."""
    path = trial.folder / FAILURE_FILE
    failure = Failure(**read_json(path)) if path.is_file() else None
    return failure if failure is not None and failure.key == key else None
