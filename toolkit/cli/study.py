"""``duel study``: the verdict over seeds, settings and checkpoints of both arms."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from toolkit.cli.options import (
    FORCE,
    JSON,
    PATH,
    POSITIVE,
    RAY,
    SET,
    complete_recipes,
    emit,
    reporter_of,
    say,
    wrapped,
)


@click.command()
@click.argument("recipe", required=False, shell_complete=complete_recipes)
@click.option("--out", type=PATH, help="Study folder; the default is runs/NAME. With --table: folder for study.json.")
@click.option("--seeds", type=POSITIVE, metavar="N", help="Seeds of each trial, in place of study.seeds.")
@click.option("--trials", type=POSITIVE, metavar="N", help="Settings that each arm tries, in place of study.trials.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: one task after the other; ray: all at once on Ray.",
)
@RAY
@SET
@click.option("--dry-run", is_flag=True, help="Show trials, shared stages and an estimate of the time, and stop.")
@click.option("--table", type=PATH, help="Run nothing: read this Parquet file with a row for each policy and prompt.")
@click.option(
    "--kl-limit",
    type=click.FloatRange(0, min_open=True),
    metavar="NATS",
    help="Choose only among policies whose KL on dev prompts is at most this.",
)
@FORCE
@JSON
@click.pass_context
def study(
    ctx: click.Context,
    /,
    recipe: str | None,
    out: Path | None,
    seeds: int | None,
    trials: int | None,
    engine: str,
    ray_cpus: float | None,
    ray_gpus: float | None,
    ray_memory: float | None,
    sets: tuple[str, ...],
    dry_run: bool,
    table: Path | None,
    kl_limit: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare RM + PPO with DPO over seeds and settings.

    RECIPE has a section `study`. Both arms try the same number of settings with every seed. Settings and checkpoints
    are chosen on dev prompts. The verdict is on test prompts: best against best, at equal KL, at equal compute, and by
    the number of trials. The same command continues a study that was stopped.

    With --table nothing is trained: the table has scores of policies that were trained elsewhere (docs/study.md).
    """
    if (recipe is None) == (table is None):
        raise click.UsageError("name a RECIPE with a section `study`, or a --table of recorded policies")
    if table is not None:
        given = {"--seeds": seeds, "--trials": trials, "--set": sets or None, "--dry-run": dry_run or None}
        wrong = [option for option, value in given.items() if value is not None]
        resources = {"--ray-cpus": ray_cpus, "--ray-gpus": ray_gpus, "--ray-memory": ray_memory}
        wrong += [option for option, value in resources.items() if value is not None]
        if wrong or engine != "local":
            raise click.UsageError(f"{', '.join(wrong or ['--engine'])} is for a RECIPE: a --table was run already")
        _of_table(table, kl_limit, out, force, as_json)
        return
    if force:
        raise click.UsageError("--force is for a --table: a study of a RECIPE goes on, and replaces nothing")
    assert recipe is not None
    options = {"study.seeds": seeds, "study.trials": trials, "study.kl_limit": kl_limit}
    for name in (name for name, value in options.items() if value is not None):
        if any(text.partition("=")[0].strip() == name for text in sets):
            option = name.removeprefix("study.").replace("_", "-")
            raise click.UsageError(f"{name} is given twice, by --set and by --{option}")
    changes = [f"{name}={value}" for name, value in options.items() if value is not None]
    on_ray = engine, (ray_cpus, ray_gpus, ray_memory)
    _of_recipe(ctx, recipe, (*sets, *changes), out, on_ray, dry_run=dry_run, as_json=as_json)


def _of_recipe(
    ctx: click.Context,
    recipe: str,
    sets: tuple[str, ...],
    out: Path | None,
    on_ray: tuple[str, tuple[float | None, float | None, float | None]],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """``on_ray``: the engine, and what its tasks ask for."""
    from toolkit.recipe.files import load_recipe
    from toolkit.runs.engines import TaskResources
    from toolkit.runs.study.trials import StudyPlan

    given = tuple(text for text in sets if not text.startswith(("study.seeds=", "study.trials=", "study.kl_limit=")))
    loaded = load_recipe(recipe, given)
    if loaded.recipe.study is None:  # not made by --seeds alone
        sets = given
    plan = StudyPlan(recipe, sets, out or Path("runs") / loaded.recipe.name)
    reporter = reporter_of(ctx)
    if dry_run:
        from toolkit.runs.study.dry_run import describe, render

        described = describe(plan)
        emit(described) if as_json else say(wrapped(render(described)))
        return
    from toolkit.cli.tables import study_tables
    from toolkit.runs.study.run import run_study

    engine, resources = on_ray[0], TaskResources(*on_ray[1])
    command = ["duel", *sys.argv[1:]]
    document = run_study(plan, reporter, engine=engine, resources=resources, command=command)
    if as_json:
        emit(document)
        return
    say(study_tables(document))
    say(f"\nreport: {plan.out / 'report.html'}")


def _of_table(table: Path, kl_limit: float | None, out: Path | None, force: bool, as_json: bool) -> None:
    from toolkit.cli.tables import study_tables
    from toolkit.evals.study.study import study as study_document
    from toolkit.evals.study.table import read_study
    from toolkit.files import read_json, refuse_existing, write_json
    from toolkit.runs.kinds import refuse_others_folder
    from toolkit.runs.store import STUDY_FILE

    document = study_document(read_study(table), kl_limit=kl_limit)
    if out is not None:
        target = out / STUDY_FILE
        refuse_others_folder(out, "study of a table", (), force)
        if not (target.exists() and read_json(target) == document):
            refuse_existing(target, force)
            write_json(target, document)
    if as_json:
        emit(document)
        return
    say(study_tables(document))
    if out is not None:
        say(f"\nwritten: {target}\nNext: {shlex.join(['duel', 'report', str(out)])}")


COMMANDS = (study,)
