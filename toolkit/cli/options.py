"""What the commands share: options, completions, output."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from toolkit.cli.examples import epilog
from toolkit.errors import nearest, shown
from toolkit.evals.words import lines_of

if TYPE_CHECKING:
    from toolkit.progress import Reporter

Function = TypeVar("Function", bound=Callable[..., Any])


class Decorator(Protocol):
    """Adds something to a command's function, and returns it."""

    def __call__(self, function: Function, /) -> Function: ...


class Group(click.Group):
    """A group that suggests the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def common(command: click.Command) -> click.Command:
    """What all commands have, those in a group, too: ``-q``, ``--debug`` and ``--json`` behind them, and examples."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            common(inner)
        return command
    command.epilog = epilog(command.name)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.metavar is None and not parameter.is_flag:
            parameter.metavar = METAVARS.get(type(parameter.type))
    for flags, name, text in (
        (["-q", "--quiet"], "quiet", "Show results and errors, but no progress."),
        (["--debug"], "debug", "Show the traceback of an error."),
    ):
        command.params.append(
            click.Option(flags, is_flag=True, expose_value=False, callback=partial(_remember, name), help=text)
        )
    if all(parameter.name != "as_json" for parameter in command.params):
        command.params.append(
            click.Option(["--json"], is_flag=True, expose_value=False, hidden=True, callback=_refuse_json)
        )
    return command


def _remember(name: str, ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.find_root().obj[name] |= value


def _refuse_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value or ctx.find_root().obj["json"]:
        raise click.UsageError(f"{ctx.command_path} has no --json: {WITHOUT_JSON[ctx.command.name]}", ctx)


def _also_before(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    return value or bool(ctx.find_root().obj["json"])


def reporter_of(ctx: click.Context) -> Reporter:
    """The reporter of a command, which shows our notes."""
    from toolkit.progress import Reporter, show_notes

    reporter = Reporter(quiet=ctx.obj["quiet"])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    show_notes(reporter)
    return reporter


def quiet_libraries() -> None:
    """Libraries that are imported from now on show no progress bars, and of messages only errors.

    What they print is for their developers, and our bars say how long things take. Processes that a command starts
    inherit it. A variable that the user has set stays.
    """
    from toolkit.models import tokenizer_threads

    tokenizer_threads.off_by_default()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers asks huggingface_hub
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")


def emit(document: Any) -> None:
    """Print the one JSON document of ``--json``."""
    print(json.dumps(document, indent=2, allow_nan=False))


def say(text: object, end: str = "\n") -> None:
    """Print text for people. Names and texts of data may hold what a terminal would obey."""
    print(shown(str(text)), end=end)


def wrapped(text: str, further_in: int = 2) -> str:
    """Text whose long lines go on below, some characters further in, for a terminal of 80 columns.

    >>> print(wrapped("  " + "word " * 17))
      word word word word word word word word word word word word word word word
        word word
    """
    lines = []
    for line in text.splitlines():
        lines += lines_of(line, 79, " " * (len(line) - len(line.lstrip()) + further_in))
    return "\n".join(lines) + ("\n" if text.endswith("\n") else "")


# ---------------------------------------------------------------- shell completion


def complete_recipes(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    """Names of shipped recipes, then files."""
    from click.shell_completion import CompletionItem

    from toolkit.recipe.files import shipped_recipes

    names = [CompletionItem(name) for name in shipped_recipes() if name.startswith(typed)]
    return names or [CompletionItem(typed, type="file")]


def complete_stages(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    from toolkit.runs.plan import STAGE_NAMES

    return [name for name in STAGE_NAMES if name.startswith(typed)]


def complete_runs(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    """Run folders under runs/, then any folder."""
    from click.shell_completion import CompletionItem

    folders = sorted(str(path.parent) for path in Path("runs").glob("*/manifest.json"))
    names = [CompletionItem(name) for name in folders if name.startswith(typed)]
    return names or [CompletionItem(typed, type="dir")]


def complete_settings(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    """Settings of a recipe, with what they mean."""
    from click.shell_completion import CompletionItem

    from toolkit.recipe.reference import reference

    return [CompletionItem(f"{row.name}=", help=row.meaning) for row in reference() if row.name.startswith(typed)]


# ---------------------------------------------------------------- options


def group(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order of ``--help``."""

    def decorate(function: Function, /) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(1)
SET = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="a.b=v",
    shell_complete=complete_settings,
    help="Set a value of the recipe. Can be given several times.",
)
# What an option takes, where it does not say so itself.
METAVARS: dict[type[Any], str] = {
    click.IntRange: "N",
    click.FloatRange: "X",
    click.types.FloatParamType: "X",
}
# Why a command has no JSON document.
WITHOUT_JSON: dict[str | None, str] = {
    "show": "what it prints is the file of the recipe, in YAML",
    "copy": "it copies a file",
    "report": "it writes an HTML page; the numbers are in results.json or study.json of the folder",
    "watch": "it serves an HTML page; the numbers are in metrics.jsonl of the run",
    "completion": "what it prints is for the shell",
}
JSON_HELP = "Print one JSON document on stdout, and nothing else there."
JSON = click.option("--json", "as_json", is_flag=True, callback=_also_before, help=JSON_HELP)
SEED_RANGE = click.IntRange(0, 2**32 - 1)  # numpy takes no larger one
SEED = click.option("--seed", type=SEED_RANGE, default=0, show_default=True, help="Seed of everything that is random.")
SPLIT = click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
PROMPT_LIMIT = click.option("--limit", type=POSITIVE, metavar="N", help="Use only N of the prompts.")
FORCE = click.option("--force", is_flag=True, help="Overwrite an existing file.")
WITH_TEXT = click.option("--with-text", is_flag=True, help="Add the texts of prompts and responses to the table.")
# What a task on Ray asks for.
RAY = group(
    click.option(
        "--ray-cpus",
        type=click.FloatRange(0),
        metavar="N",
        help="CPUs of each task on Ray; the default is 1 beside GPUs and 2 without.",
    ),
    click.option(
        "--ray-gpus",
        type=click.FloatRange(0),
        metavar="N",
        help="GPUs of each task on Ray, 0.5 for half of one; the default is 1 where there are some.",
    ),
    click.option(
        "--ray-memory",
        type=click.FloatRange(0),
        metavar="GIB",
        help="Memory of each task on Ray, in GiB; by default it is not counted.",
    ),
)
