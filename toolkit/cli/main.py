"""The command line. Commands parse, call and print; the work and the heavy imports are in what they call."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from toolkit.cli import folders, measure
from toolkit.cli.options import (
    JSON,
    PATH,
    SET,
    Group,
    complete_recipes,
    complete_stages,
    emit,
    quiet_libraries,
    reporter_of,
)
from toolkit.errors import EXIT_CODE_FILE, DuelError

USER_ERROR, DEFECT, INTERRUPTED = 2, 1, 130


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, results and errors only.")
@click.version_option(package_name="rlhf-duel", prog_name="duel")
@click.pass_context
def cli(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """DPO, or a reward model and PPO? Both arms on your preference data, one evaluation, one verdict."""
    ctx.obj = {"debug": debug, "quiet": quiet}


for command in (*measure.COMMANDS, *folders.COMMANDS):
    cli.add_command(command)


def main() -> NoReturn:
    """The console script: errors become one message and an exit code (0 done, 2 input, 1 defect, 130 interrupted)."""
    code = _run()
    if code == USER_ERROR and (told := os.environ.get(EXIT_CODE_FILE)):
        from toolkit.files import write_text

        write_text(Path(told), str(code))  # the launcher of several processes would make a 1 of it
    sys.exit(code)


def _run() -> int:
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except click.ClickException as error:
        error.show(sys.stderr)
        return USER_ERROR
    except DuelError as error:
        _show(debug)
        print(f"error: {error.render()}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if _interrupted(error):
            print("\ninterrupted; run the same command again to continue", file=sys.stderr)
            return INTERRUPTED
        _show(debug)
        if (message := _system_message(error)) is not None:
            print(message, file=sys.stderr)
            return USER_ERROR
        print(
            f"internal error: {type(error).__name__}: {error}\n  This is a defect of duel. Please report it with the "
            "output of `duel env` and of the same command under `duel --debug`.",
            file=sys.stderr,
        )
        return DEFECT


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C stands behind an error: one that comes in the middle of an import surfaces as something else."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _system_message(error: BaseException | None) -> str | None:
    """What a person can do about a full disk or a missing permission; None for any other error.

    Some writers wrap the system's error in one of their own, so causes and texts are looked at as well.
    """
    while error is not None:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        where = getattr(error, "filename", None) or os.getcwd()
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
            return f"error: the disk is full\n  where: {where}\n  fix:   free space, then run the same command"
        if number == errno.EFBIG or "File too large" in text:
            return f"error: the disk takes no file this large\n  where: {where}\n  fix:   raise the limit (ulimit -f)"
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            return f"error: {os.strerror(number)}\n  where: {where}\n  fix:   choose a folder you can write"
        error = error.__cause__ or error.__context__
    return None


def _show(debug: bool) -> None:
    if debug:
        traceback.print_exc()


# ---------------------------------------------------------------- the paired run


@cli.command(context_settings={"allow_interspersed_args": True})
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("launch", nargs=-1, type=click.UNPROCESSED)
@click.option("--out", type=PATH, help="Run folder; default runs/NAME.")
@SET
@click.option(
    "--only", metavar="STAGE", shell_complete=complete_stages, help="Run this stage alone; its inputs must be there."
)
@click.option("--until", metavar="STAGE", shell_complete=complete_stages, help="Stop behind this stage.")
@click.option("--force", is_flag=True, help="Run stages again that are done.")
@click.option("--dry-run", is_flag=True, help="Say what would run, with counts and an example, and stop.")
@JSON
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str,
    launch: tuple[str, ...],
    out: Path | None,
    sets: tuple[str, ...],
    only: str | None,
    until: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run RECIPE: both arms, one evaluation, one verdict. A rerun continues, and computes nothing twice.

    What follows -- goes to `accelerate launch` for the sft, reward_model and dpo stages.
    """
    from toolkit.files import read_json
    from toolkit.recipe.files import load_recipe
    from toolkit.runs import pipeline

    loaded = load_recipe(recipe, sets)
    out = out or Path("runs") / loaded.recipe.name
    reporter = reporter_of(ctx)
    if dry_run:
        from toolkit.runs.dry_run import describe, render

        quiet_libraries()
        plan = describe(loaded, out)
        emit(plan) if as_json else print(render(plan))
        return
    options = pipeline.RunOptions(
        only=only,
        until=until,
        force=force,
        launch=launch,
        command=["duel", *sys.argv[1:]],
        before_stage=quiet_libraries,
    )
    manifest = pipeline.run(loaded, out, reporter, options)
    results = (
        read_json(out / "results.json") if (out / "results.json").is_file() and manifest["status"] == "done" else {}
    )
    if as_json:
        facts = {"out": str(out), "status": manifest["status"], "stages": manifest["stages"]}
        emit({**facts, **{key: results[key] for key in ("verdict", "win_rates", "cost", "warnings") if key in results}})
    elif results:
        from toolkit.cli.tables import result_tables

        print(result_tables(results))
        print(f"\nreport: {out / 'report.html'}")


@cli.command()
@click.argument("recipe", shell_complete=complete_recipes)
@SET
@JSON
def validate(recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE without data, model or network."""
    from toolkit.recipe.checks import arm_differences
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.schema import flat

    loaded = load_recipe(recipe, sets)
    differences = {name: list(pair) for name, pair in arm_differences(loaded.recipe).items()}
    if as_json:
        emit({"valid": True, "name": loaded.recipe.name, "arm_differences": differences, "origins": loaded.origins})
        return
    changed = sum(origin != "default" for origin in loaded.origins.values())
    print(f"{loaded.recipe.name}: valid, {len(flat(loaded.recipe))} settings, {changed} of them not defaults")
    for name, (ppo, dpo) in differences.items():
        print(f"  note: the arms differ in {name}: PPO {ppo}, DPO {dpo}")


@cli.command()
@click.option("--markdown", "as_markdown", is_flag=True, help="The recipe reference, for people.")
def schema(as_markdown: bool) -> None:
    """Print the JSON schema of a recipe file, for editors; or what every setting takes, for people."""
    from toolkit.recipe.reference import json_schema, markdown

    print(markdown(), end="") if as_markdown else emit(json_schema())


@cli.group(cls=Group)
def recipes() -> None:
    """The recipes that ship with duel."""


@recipes.command("list")
@JSON
def recipes_list(as_json: bool) -> None:
    """Names and what they are for."""
    from toolkit.recipe.files import shipped_recipes

    found = {}
    for name, path in shipped_recipes().items():
        lines = [
            line.lstrip("# ").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
        ]
        found[name] = lines[0] if lines else ""
    if as_json:
        emit([{"name": name, "summary": text} for name, text in found.items()])
        return
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}")


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipes)
def recipes_show(name: str) -> None:
    """Print a recipe as it ships, with its comments."""
    from toolkit.recipe.files import load_recipe

    path = load_recipe(name).path
    if path is not None:
        print(path.read_text(encoding="utf-8"), end="")


@recipes.command("copy")
@click.argument("name", shell_complete=complete_recipes)
@click.argument("target", type=PATH, required=False)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def recipes_copy(name: str, target: Path | None, force: bool) -> None:
    """Copy a recipe to TARGET (default NAME.yaml) to start your own."""
    from toolkit.recipe.files import copy_recipe

    print(copy_recipe(name, target or Path(f"{name}.yaml"), force))


@cli.command()
@click.argument("recipe", shell_complete=complete_recipes)
@click.option("--grid", multiple=True, metavar="a.b=v1,v2", help="Values of a setting; several grids are crossed.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Run each point with seeds 0..N-1.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="One run after the other here, or all at once on Ray.",
)
@click.option("--out", type=PATH, help="Folder of the runs; default runs/NAME-sweep.")
@SET
@JSON
@click.pass_context
def sweep(
    ctx: click.Context,
    recipe: str,
    grid: tuple[str, ...],
    seeds: int,
    engine: str,
    out: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Frontiers: many paired runs that share every stage that is equal."""
    from toolkit.cli.tables import sweep_table
    from toolkit.recipe.files import load_recipe
    from toolkit.runs.sweep import Sweep, run_sweep

    out = out or Path("runs") / f"{load_recipe(recipe, sets).recipe.name}-sweep"
    asked = Sweep(recipe, sets, grid, seeds, out)
    rows = run_sweep(asked, reporter_of(ctx), engine=engine, before_stage=quiet_libraries)
    emit({"runs": rows}) if as_json else print(sweep_table(rows))


@cli.command()
@JSON
def env(as_json: bool) -> None:
    """What a bug report needs: versions, machine, devices, short names that resolve here."""
    import platform

    import torch

    from toolkit.errors import ModelError
    from toolkit.models.resolve import SHORT_NAMES, resolve
    from toolkit.runs.facts import versions

    names = {}
    for name in SHORT_NAMES:
        try:
            names[name] = resolve(name).path
        except ModelError as error:
            names[name] = f"not here: {error.what}"
    facts = {
        "versions": versions(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "models": names,
    }
    if as_json:
        emit(facts)
        return
    for section, value in facts.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        print("\n".join(f"{section if not i else '':13} {name} {item}" for i, (name, item) in enumerate(items)))
