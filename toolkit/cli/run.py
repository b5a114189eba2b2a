"""Commands around the paired run: run a recipe, check it, sweep it; the recipes that ship; the environment."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli.options import (
    JSON,
    PATH,
    RAY,
    SET,
    Group,
    complete_recipes,
    complete_stages,
    emit,
    reporter_of,
    say,
    wrapped,
)

if TYPE_CHECKING:
    from toolkit.progress import Reporter
    from toolkit.recipe.files import LoadedRecipe
    from toolkit.runs.pipeline import RunOptions


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("launch", nargs=-1, type=click.UNPROCESSED)
@click.option("--out", type=PATH, help="Run folder; the default is runs/NAME.")
@SET
@click.option(
    "--only",
    metavar="STAGE",
    shell_complete=complete_stages,
    help="Run this stage alone. The stages before it must be done.",
)
@click.option("--until", metavar="STAGE", shell_complete=complete_stages, help="Stop after this stage.")
@click.option("--force", is_flag=True, help="Run finished stages again.")
@click.option("--dry-run", is_flag=True, help="Show what would run, with counts and an example, and stop.")
@click.option(
    "--estimate",
    is_flag=True,
    help="Time the model for some seconds first, and estimate how long each stage takes on this machine. With "
    "--dry-run, stop there.",
)
@JSON
@click.pass_context
def run(
    ctx: click.Context,
    /,
    recipe: str,
    out: Path | None,
    sets: tuple[str, ...],
    dry_run: bool,
    estimate: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run RECIPE: both arms, one evaluation, one verdict.

    The same command continues a run that was stopped. Nothing is computed twice.

    Arguments after -- go to `accelerate launch`, which runs the stages that train, sample or score.
    """
    from toolkit.cli.next_steps import next_study
    from toolkit.cli.tables import held_out_line, result_tables
    from toolkit.runs.pipeline import RunOptions
    from toolkit.runs.pipeline import run as run_recipe
    from toolkit.runs.precision import load_for_run
    from toolkit.runs.store import REPORT_FILE, RESULTS_FILE, read_document

    loaded = load_for_run(recipe, sets)
    out = out or Path("runs") / loaded.recipe.name
    reporter = reporter_of(ctx)
    asked = RunOptions(**options, command=["duel", *sys.argv[1:]])
    estimated = _estimated(loaded, out, asked, reporter, show=not as_json) if estimate else {}
    if dry_run:
        from toolkit.runs.dry_run import describe, render

        described = describe(loaded, out, asked)
        if as_json:
            emit({**described, **estimated})
            return
        plan, heading, example = render(described).partition("first training example")  # the example stays as it is
        say(wrapped(plan) + heading + example)
        return
    manifest = run_recipe(loaded, out, reporter, asked)
    order, last = list(manifest["keys"]), asked.only or asked.until or "report"
    evaluated = "evaluate" in manifest["stages"] and order.index(last) >= order.index("evaluate")
    results = read_document(out / RESULTS_FILE) if evaluated else {}
    judged = bool(results and results["verdict"]["judges"])
    said, study = next_study(recipe, loaded.recipe, judged, sets)
    accuracy = None
    if last == "reward_model":
        from toolkit.measure.held_out import held_out_accuracy

        accuracy = held_out_accuracy(out, loaded.recipe, reporter)
    if as_json:
        facts = {"out": str(out), "status": manifest["status"], "stages": manifest["stages"], **estimated}
        facts |= {"reward_model": accuracy} if accuracy is not None else {}
        results |= {"next": f"{said} {study}"} if results else {}
        shown = ("verdict", "next", "win_rates", "temperatures", "cost", "warnings")
        emit({**facts, **{key: results[key] for key in shown if key in results}})
    elif results:
        say(f"{result_tables(results)}\n")
        if "report" in manifest["stages"]:
            say(f"report: {out / REPORT_FILE}\n")
        say(f"{wrapped(said)}\n{study}")  # the command is whole, to be copied
    elif accuracy is not None:
        say(held_out_line(accuracy))


def _estimated(
    loaded: LoadedRecipe, out: Path, options: RunOptions, reporter: Reporter, *, show: bool
) -> dict[str, Any]:
    """``{"estimate": ...}`` of what is left of a run, which is shown, too."""
    from toolkit.runs.estimate import estimate, render

    estimated = estimate(loaded, out, reporter, options)
    if show:
        say(render(loaded.recipe.name, estimated) + "\n")
    return {"estimate": estimated}


@click.command()
@click.argument("recipe", shell_complete=complete_recipes)
@SET
@JSON
def validate(recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE without data, model or network."""
    from toolkit.recipe.arms import planned_differences
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.schema import flat

    loaded = load_recipe(recipe, sets)
    differences = [difference for difference in planned_differences(loaded.recipe) if difference.differs]
    if as_json:
        pairs = {difference.name: [difference.ppo, difference.dpo] for difference in differences}
        emit({"valid": True, "name": loaded.recipe.name, "arm_differences": pairs, "origins": loaded.origins})
        return
    changed = sum(origin != "default" for origin in loaded.origins.values())
    say(f"{loaded.recipe.name}: valid, {len(flat(loaded.recipe))} settings, {changed} of them not defaults")
    for difference in differences:
        say(wrapped(f"  note: {difference.sentence}"))
    given = [word for text in sets for word in ("--set", text)]
    say(f"Next: {shlex.join(['duel', 'run', recipe, *given, '--dry-run'])}")  # whole, to be copied


@click.command()
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the settings as a table for people.")
@JSON
def schema(as_markdown: bool, as_json: bool) -> None:
    """Print the JSON schema of a recipe file.

    Editors complete and check recipes with it. With --markdown, the settings are printed for people.
    """
    from toolkit.recipe.reference import json_schema, markdown

    if as_markdown and as_json:
        raise click.UsageError("--markdown is a table for people: leave out --markdown or --json")
    say(markdown(), end="") if as_markdown else emit(json_schema())


@click.group(cls=Group)
def recipes() -> None:
    """List, show or copy the recipes that ship with duel."""


@recipes.command("list")
@JSON
def recipes_list(as_json: bool) -> None:
    """List the recipes with what each is for."""
    from toolkit.recipe.files import shipped_recipes, summary_of

    summaries = {name: summary_of(path) for name, path in shipped_recipes().items()}
    if as_json:
        emit([{"name": name, "summary": text} for name, text in summaries.items()])
        return
    width = max(map(len, summaries))
    for name, text in summaries.items():
        say(textwrap.fill(f"{name:{width}}  {text}", 79, subsequent_indent=" " * (width + 2), break_on_hyphens=False))


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipes)
def recipes_show(name: str) -> None:
    """Print a recipe as it ships, with its comments."""
    from toolkit.recipe.files import load_recipe

    say(load_recipe(name).path.read_text(encoding="utf-8"), end="")


@recipes.command("copy")
@click.argument("name", shell_complete=complete_recipes)
@click.argument("target", type=PATH, required=False)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def recipes_copy(name: str, target: Path | None, force: bool) -> None:
    """Copy a recipe to TARGET (default NAME.yaml), to edit it."""
    from toolkit.recipe.files import copy_recipe

    copied = copy_recipe(name, target or Path(f"{name}.yaml"), force)
    say(f"{copied}\nNext: edit it, then duel validate {shlex.quote(str(copied))}")


@click.command()
@click.argument("recipe", shell_complete=complete_recipes)
@click.option(
    "--grid", multiple=True, metavar="a.b=v1,v2", help="Values of a setting. Several grids make every combination."
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    metavar="N",
    help="Run each combination with the seeds 0 to N-1, in place of the recipe's seed.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: one run after the other; ray: all at once on Ray.",
)
@RAY
@click.option("--out", type=PATH, help="Folder of the runs; the default is runs/NAME-sweep.")
@SET
@JSON
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    recipe: str,
    out: Path | None,
    sets: tuple[str, ...],
    engine: str,
    ray_cpus: float | None,
    ray_gpus: float | None,
    ray_memory: float | None,
    as_json: bool,
    grid: tuple[str, ...],
    seeds: int | None,
) -> None:
    """Run RECIPE with every combination of some settings. Equal stages are computed once."""
    from toolkit.cli.tables import sweep_table
    from toolkit.recipe.files import load_recipe
    from toolkit.runs.engines import TaskResources
    from toolkit.runs.sweep import Sweep, parse_grid, run_sweep

    out = out or Path("runs") / f"{load_recipe(recipe, sets).recipe.name}-sweep"
    planned = Sweep(recipe, sets, parse_grid(grid), seeds, out)
    resources = TaskResources(ray_cpus, ray_gpus, ray_memory)
    rows = run_sweep(planned, reporter_of(ctx), engine=engine, resources=resources)
    if as_json:
        emit({"runs": rows})
        return
    say(f"{sweep_table(rows)}\n\nNext: {shlex.join(['duel', 'report', str(out)])}")


@click.command()
@JSON
def env(as_json: bool) -> None:
    """Show the facts that a bug report needs.

    It lists versions, the machine, its devices, and the models that are installed, by their short names.
    """
    from toolkit.runs.facts import environment

    facts = environment()
    if as_json:
        emit(facts)
        return
    for section, value in facts.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        say("\n".join(f"{section if not i else '':13} {name} {item}" for i, (name, item) in enumerate(items)))


COMMANDS = (run, validate, schema, recipes, sweep, env)
