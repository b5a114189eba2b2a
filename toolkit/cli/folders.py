"""Commands on existing run folders: report, watch, list, compare and publish them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toolkit.cli.options import FORCE, JSON, PATH, complete_runs, emit, reporter_of, say

MAX_SAMPLES = click.option(
    "--max-samples",
    type=click.IntRange(1),
    help="Largest number of prompts whose samples are shown; the default is the recipe's report.max_samples.",
)


@click.command()
@click.argument("folder", type=PATH, nargs=-1, required=True, shell_complete=complete_runs)
@click.option(
    "--out",
    type=PATH,
    help="File to write; the default is report.html in FOLDER, or report-side-by-side.html in the first of several.",
)
@click.option("--title", help="Title of the page.")
@MAX_SAMPLES
@FORCE
def report(folder: tuple[Path, ...], out: Path | None, title: str | None, max_samples: int | None, force: bool) -> None:
    """Write the HTML report of FOLDER, a run, a sweep or a study. Several runs share one page."""
    from toolkit.report.writing import write_page

    say(write_page(folder, out, title, max_samples, force))


@click.command()
@click.argument("folder", type=PATH, shell_complete=complete_runs)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; the default is a free one.")
@MAX_SAMPLES
@click.pass_context
def watch(ctx: click.Context, /, folder: Path, port: int, max_samples: int | None) -> None:
    """Serve the report of a run or a study while it goes on.

    The page is for this machine alone. Ctrl-C ends it, and not the run.
    """
    from toolkit.report.watch import watch as serve

    serve(folder, port=port, max_samples=max_samples, reporter=reporter_of(ctx))


@click.command()
@click.argument("folder", type=PATH, default=Path("runs"))
@JSON
def runs(folder: Path, as_json: bool) -> None:
    """List the runs and studies below FOLDER (default: runs).

    Each has its status and, where it is done, its verdict. The trials of a study are listed where FOLDER is its folder.
    """
    from toolkit.cli.tables import runs_table
    from toolkit.runs.listing import list_runs

    rows = list_runs(folder)
    emit({"runs": rows}) if as_json else say(runs_table(rows) if rows else f"no run below {folder}")


@click.command()
@click.argument("first", type=PATH, shell_complete=complete_runs)
@click.argument("second", type=PATH, shell_complete=complete_runs)
@JSON
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Show what differs between two runs.

    The runs are compared by their settings, versions, stages and results.
    """
    from toolkit.cli.tables import diff_tables
    from toolkit.runs.listing import diff_runs

    differences = diff_runs(first, second)
    emit(differences) if as_json else say(diff_tables(differences))


@click.command()
@click.argument("manifest", type=PATH, shell_complete=complete_runs)
@click.argument("launch", nargs=-1, type=click.UNPROCESSED)
@click.option("--out", type=PATH, help="Run folder; the default is runs/NAME-rerun.")
@JSON
@click.pass_context
def rerun(ctx: click.Context, /, manifest: Path, out: Path | None, launch: tuple[str, ...], as_json: bool) -> None:
    """Repeat the run of MANIFEST, and compare the results.

    MANIFEST is the manifest.json of a run, or its folder. Versions, machine, inputs, weights and results are
    compared. The same command continues a repetition that was stopped.
    """
    from toolkit.cli.tables import rerun_tables
    from toolkit.runs.pipeline import RunOptions
    from toolkit.runs.rerun import rerun as run_again

    options = RunOptions(launch=launch, command=["duel", *sys.argv[1:]])
    compared = run_again(manifest, out, reporter_of(ctx), options)
    emit(compared) if as_json else say(rerun_tables(compared))


@click.command()
@click.argument("folder", type=PATH, shell_complete=complete_runs)
@click.argument("name", required=False)
@click.option("--to", type=PATH, help="Write the repositories into this folder instead of sending them.")
@click.option(
    "--only",
    "artifacts",
    multiple=True,
    help="Push this part alone: sft, ppo, dpo, rft, reward-model or preferences. Can be given several times.",
)
@click.option("--public", is_flag=True, help="Make the repositories public; the default is private.")
@JSON
@click.pass_context
def push(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Push the models and data of a run to the hub.

    FOLDER is the run's. NAME is USER/NAME; the repositories are NAME-sft, NAME-ppo and so on, with filled cards.
    Adapters are merged, so that each model loads with transformers alone.
    """
    from toolkit.runs.push import push_run

    reporter = reporter_of(ctx)
    pushed = push_run(reporter=reporter, **options)
    lines = (f"{artifact:14} {place}" for artifact, place in pushed.items())
    emit({"pushed": pushed}) if as_json else say("\n".join(lines))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the code for completion in SHELL.

    It completes commands, options, recipes and settings. In ~/.bashrc: eval "$(duel completion bash)". In ~/.zshrc:
    eval "$(duel completion zsh)". In fish: duel completion fish | source.
    """
    from click.shell_completion import get_completion_class

    context = click.get_current_context().find_root()
    complete = get_completion_class(shell)
    assert complete is not None  # click has all three
    say(complete(context.command, {}, "duel", "_DUEL_COMPLETE").source())


COMMANDS = (report, watch, runs, diff, rerun, push, completion)
