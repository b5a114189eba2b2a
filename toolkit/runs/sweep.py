"""``duel sweep``: many paired runs over a grid and seeds, which share every stage that is equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from toolkit.errors import RecipeError
from toolkit.files import fingerprint, write_json
from toolkit.progress import Reporter
from toolkit.recipe.files import LoadedRecipe
from toolkit.runs import pipeline
from toolkit.runs.engines import Engine, Task, TaskResources, engine_of
from toolkit.runs.kinds import refuse_others_folder
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.plan import plan_stages
from toolkit.runs.precision import load_for_run
from toolkit.runs.store import RESULTS_FILE, SWEEP_FILE, RunFolder, read_document
from toolkit.storage.locks import held

LONGEST_FOLDER_NAME = 100


@dataclass(frozen=True)
class Job:
    """A point of the grid with one seed, the folder of its run, and the command that runs it alone."""

    label: str
    settings: dict[str, str]
    loaded: LoadedRecipe
    folder: Path
    command: Sequence[str]


def parse_grid(grid: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The settings of a grid, each with its values. Raises RecipeError for what is not KEY=VALUE,VALUE.

    Commas inside brackets and quotes belong to a value.

    >>> parse_grid(["dpo.beta=0.05,0.1", "evaluate.judges=[gold, rm],[gold]"])
    [('dpo.beta', ['0.05', '0.1']), ('evaluate.judges', ['[gold, rm]', '[gold]'])]
    """
    axes = []
    for text in grid:
        key, equals, listed = text.partition("=")
        values = [value.strip() for value in _split(listed) if value.strip()]
        if not equals or not key.strip() or not values:
            raise RecipeError(f"{text!r} is no grid", where="--grid", fix="write it as dpo.beta=0.05,0.1,0.5")
        axes.append((key.strip(), values))
    return axes


def _split(listed: str) -> list[str]:
    """The values between commas that are neither in brackets nor in quotes."""
    values, depth, quote = [""], 0, ""
    for character in listed:
        if character == "," and depth == 0 and not quote:
            values.append("")
            continue
        values[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not values[-1][:-1].strip():  # inside a word it is an apostrophe
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
    return values


@dataclass(frozen=True)
class Sweep:
    """A recipe with settings, the grid over it, and how many seeds each point runs with. Its runs lie below ``out``.

    ``grid`` has (setting, values), each value as ``--set`` takes it. Without ``seeds`` the seed is the recipe's.
    """

    recipe: str
    sets: Sequence[str]
    grid: Sequence[tuple[str, Sequence[str]]]
    seeds: int | None
    out: Path

    def jobs(self) -> list[Job]:
        """A job for every point of the grid and every seed.

        Raises RecipeError where one of them is no valid recipe, where two are the same, and where the seeds or the
        values of a setting are given twice.
        """
        self._refuse_unclear()
        keys = [key for key, _ in self.grid]
        seeds: list[dict[str, str]] = [{}] if self.seeds is None else [{"seed": str(n)} for n in range(self.seeds)]
        jobs: list[Job] = []
        for values in product(*(values for _, values in self.grid)):
            for seed in seeds:
                settings = dict(zip(keys, values, strict=True)) | seed
                changes = [f"{key}={value}" for key, value in settings.items()]
                label = ",".join(changes) or "default"
                name = label.replace("/", "_")
                folder = self.out / (name if len(name) < LONGEST_FOLDER_NAME else fingerprint(settings))
                sets = [*self.sets, *changes]
                given = (word for text in sets for word in ("--set", text))
                command = ["duel", "run", self.recipe, *given, "--out", str(folder)]
                loaded = load_for_run(self.recipe, sets)
                if same := next((job.label for job in jobs if job.loaded.recipe == loaded.recipe), None):
                    what = f"two points of the grid are the same recipe: {same} and {label}"
                    raise RecipeError(what, where="--grid", fix="give each value once")
                jobs.append(Job(label, settings, loaded, folder, command))
        return jobs

    def _refuse_unclear(self) -> None:
        """Raises RecipeError for what a later word would replace in silence, and for no values or seeds at all."""
        keys = [key for key, _ in self.grid]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            what = f"{twice} has two grids"
            raise RecipeError(what, where="--grid", fix=f"one with all values: --grid {twice}=VALUE,VALUE")
        if empty := next((key for key, values in self.grid if not values), None):
            raise RecipeError(f"the grid of {empty} has no values", where="--grid", fix="give it one, or leave it out")
        if self.seeds is None:
            return
        if self.seeds < 1:
            raise RecipeError(f"{self.seeds} seeds are no run", where="seeds", fix="1 or more")
        if "seed" in keys or any(text.partition("=")[0].strip() == "seed" for text in self.sets):
            what = f"the seed is given, and {self.seeds} seeds are asked for"
            fix = "leave out one of them; --grid seed=5,6 runs these seeds"
            raise RecipeError(what, where="--seeds", fix=fix)


def run_sweep(
    sweep: Sweep,
    reporter: Reporter,
    *,
    engine: str = "local",
    resources: TaskResources | None = None,
) -> list[dict[str, Any]]:
    """Run every job, one after the other or (``engine="ray"``) at once; returns the rows of ``sweep.json``.

    ``resources`` are those of a task on Ray. Raises what a run raises.
    """
    jobs = sweep.jobs()
    refuse_others_folder(sweep.out, "sweep", (SWEEP_FILE,))
    sweep.out.mkdir(parents=True, exist_ok=True)
    with held(sweep.out / ".lock", "runs this sweep", sweep.out, fix="wait for it, or choose another --out"):
        with engine_of(engine, resources=resources) as running:
            if engine == "ray":
                compute_on_ray(jobs, running, reporter)
        return _run_jobs(sweep, jobs, reporter)


def _run_jobs(sweep: Sweep, jobs: Sequence[Job], reporter: Reporter) -> list[dict[str, Any]]:
    """What :func:`run_sweep` does while it holds the sweep's folder."""
    rows = []
    for number, job in enumerate(jobs, start=1):
        reporter.line(f"run {number} of {len(jobs)}: {job.label}")
        options = RunOptions(reuse=others_of(job, jobs), command=job.command)
        pipeline.run(job.loaded, job.folder, reporter, options)
        results = read_document(job.folder / RESULTS_FILE)
        rows.append(
            {
                "settings": job.settings,
                "out": str(job.folder),
                "verdict": results["verdict"],
                "frontier": results["frontier"],
                "wall_s": {arm: facts["wall_s"] for arm, facts in results["cost"]["arms"].items()},
            }
        )
        write_json(sweep.out / SWEEP_FILE, {"recipe": sweep.recipe, "runs": rows})
    return rows


class InFolder(Protocol):
    """A job of a sweep, or a trial of a study."""

    @property
    def folder(self) -> Path: ...


def others_of(job: InFolder, jobs: Sequence[InFolder]) -> list[Path]:
    """Folders of the other jobs that have begun: their equal stages are taken over."""
    return [other.folder for other in jobs if other.folder != job.folder and other.folder.is_dir()]


# ---------------------------------------------------------------- on Ray


def compute_on_ray(jobs: Sequence[Job], engine: Engine, reporter: Reporter) -> None:
    """Compute the stages of all jobs as tasks. A stage that several jobs share is computed once.

    Raises what a stage raises, and RuntimeError for a stage that died.
    """
    plans = [plan_stages(job.loaded, RunFolder(job.folder)) for job in jobs]
    keys = [{planned.spec.name: planned.key for planned in plan} for plan in plans]
    for name in max(keys, key=len):  # a run of more rounds has all stages of one with fewer
        first = {of_job[name]: job for of_job, job in reversed(list(zip(keys, jobs, strict=True))) if name in of_job}
        reporter.line(f"{name}: {len(first)} of {len(jobs)} runs compute it, the others take it over")
        tasks = [
            Task(job.label, _run_until, (job.loaded, job.folder.resolve(), others_of(job, jobs), name, job.command))
            for job in first.values()
        ]
        for task, outcome in zip(tasks, engine.run(name, tasks, reporter), strict=True):
            if outcome.died is not None:
                raise RuntimeError(f"{task.label}: {outcome.died}")


def _run_until(
    loaded: LoadedRecipe, folder: Path, others: list[Path], stage: str, command: Sequence[str], reporter: Reporter
) -> None:
    options = RunOptions(until=stage, reuse=others, command=command)
    pipeline.run(loaded, folder, reporter, options)
