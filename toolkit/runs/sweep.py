"""``duel sweep``: many paired runs over a grid and seeds, sharing every stage that is equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from toolkit.errors import DuelError, RecipeError
from toolkit.files import fingerprint, read_json, write_json
from toolkit.progress import Reporter
from toolkit.recipe.checks import LoadedRecipe, load_recipe
from toolkit.runs import pipeline
from toolkit.runs.store import RunFolder

# Of a task on Ray where there is no GPU, and where a node has so many.
CPUS_PER_TASK = 2


def parse_grid(grid: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``["dpo.beta=0.05,0.1"]`` -> ``[("dpo.beta", ["0.05", "0.1"])]``. Raises RecipeError where a part is missing."""
    out = []
    for text in grid:
        key, equals, values = text.partition("=")
        found = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not key.strip() or not found:
            raise RecipeError(f"{text!r} is no grid", where="--grid", fix="write it as dpo.beta=0.05,0.1,0.5")
        out.append((key.strip(), found))
    return out


@dataclass(frozen=True)
class Job:
    """A point of the grid with one seed, and the folder of its run."""

    label: str
    settings: dict[str, str]
    loaded: LoadedRecipe
    folder: Path


def jobs_of(recipe: str, sets: Sequence[str], grid: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """Every point and seed, in a folder of its own below ``out``."""
    axes = parse_grid(grid)
    points = [dict(zip([key for key, _ in axes], values, strict=True)) for values in product(*(v for _, v in axes))]
    jobs = []
    for point in points:
        for seed in range(seeds):
            settings = {**point, "seed": str(seed)} if seeds > 1 else point
            loaded = load_recipe(recipe, [*sets, *(f"{key}={value}" for key, value in settings.items())])
            label = ",".join(f"{key}={value}" for key, value in settings.items()) or "default"
            safe = label.replace("/", "_")
            jobs.append(Job(label, settings, loaded, out / (safe if len(safe) < 100 else fingerprint(settings))))
    return jobs


def run_sweep(
    recipe: str,
    sets: list[str],
    grid: list[str],
    seeds: int,
    out: Path | None,
    reporter: Reporter,
    *,
    engine: str = "local",
    before_stage: Callable[[], None],
) -> list[dict[str, Any]]:
    """Runs every job, one after the other or (``engine="ray"``) at once; writes and returns the rows of
    ``sweep.json``."""
    out = out or Path("runs") / f"{load_recipe(recipe, sets).recipe.name}-sweep"
    jobs = jobs_of(recipe, sets, grid, seeds, out)
    if engine == "ray":
        compute_on_ray(jobs, reporter)
    rows = []
    for number, job in enumerate(jobs, start=1):
        reporter.overall = ""
        reporter.line(f"run {number} of {len(jobs)}: {job.label}")
        pipeline.run(
            job.loaded,
            job.folder,
            reporter,
            reuse=others_of(job, jobs),
            command=["duel", "sweep", job.label],
            before_stage=before_stage,
        )
        results = read_json(job.folder / "results.json")
        rows.append(
            {
                "settings": job.settings,
                "out": str(job.folder),
                "verdict": results["verdict"],
                "frontier": results["frontier"],
                "wall_s": {arm: facts["wall_s"] for arm, facts in results["cost"]["arms"].items()},
            }
        )
        write_json(out / "sweep.json", {"recipe": recipe, "runs": rows})
    return rows


def others_of(job: Job, jobs: Sequence[Job]) -> list[Path]:
    """Folders of the other jobs that have begun: their equal stages are taken over."""
    return [other.folder for other in jobs if other.folder != job.folder and other.folder.is_dir()]


def compute_on_ray(jobs: Sequence[Job], reporter: Reporter) -> None:
    """Compute all stages as Ray tasks: stage by stage, each that several jobs share once, on a GPU each where the
    cluster has some and on ``CPUS_PER_TASK`` cores where not. ``RAY_ADDRESS`` names a cluster, whose nodes must see the
    folders under the same paths; without it Ray starts on this machine.

    Raises RecipeError where Ray is not installed, and what a stage raises.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RecipeError("Ray is not installed", where="--engine ray", fix="pip install 'rlhf-duel[ray]'") from None
    ray.init(log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = any(node.get("GPU", 0) for node in nodes)
        cpus = 1 if gpus else min(CPUS_PER_TASK, max(int(node.get("CPU", 0)) for node in nodes))
        task = ray.remote(_until).options(num_gpus=int(gpus), num_cpus=cpus)
        plans = [pipeline.plan(job.loaded, RunFolder(job.folder)) for job in jobs]
        for number, name in enumerate(pipeline.STAGE_NAMES):
            first = {plan[number].key: job for plan, job in reversed(list(zip(plans, jobs, strict=True)))}
            reporter.line(f"{name}: {len(first)} of {len(jobs)} runs compute it, the others take it over")
            running = {
                task.remote(job.loaded, job.folder.resolve(), others_of(job, jobs), name, Path.cwd()): job
                for job in first.values()
            }
            with reporter.task(name, len(running)) as progress:
                while running:
                    [done], _ = ray.wait(list(running))
                    problem = ray.get(done)
                    job = running.pop(done)
                    if problem is not None:
                        raise type(problem)(problem.what, where=f"{job.label}: {problem.where}", fix=problem.fix)
                    progress.advance(note=job.label)
    finally:
        ray.shutdown()


def _until(loaded: LoadedRecipe, folder: Path, others: list[Path], stage: str, cwd: Path) -> DuelError | None:
    """A task: one run up to a stage. What the user can mend comes back; anything else is raised."""
    os.chdir(cwd)
    quiet = Reporter(quiet=True)
    try:
        pipeline.run(loaded, folder, quiet, until=stage, reuse=others, command=["duel", "sweep", folder.name])
    except DuelError as error:
        return error
    return None
