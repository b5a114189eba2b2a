"""What the commands share: options, completions, output."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import click

from toolkit.errors import nearest


class Group(click.Group):
    """A group that suggests the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def reporter_of(ctx: click.Context) -> Any:
    from toolkit.progress import Reporter

    reporter = Reporter(quiet=ctx.obj["quiet"])
    # What the libraries say is for their developers; what we say about them goes through the reporter.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if "toolkit" in Path(filename).parts:
            reporter.line(f"note: {message}")

    warnings.showwarning = show
    return reporter


def quiet_libraries() -> None:
    """Once transformers is imported, its bars are off: ours say how long things take."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def emit(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


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

    found = sorted(str(path.parent) for path in Path("runs").glob("*/manifest.json"))
    names = [CompletionItem(name) for name in found if name.startswith(typed)]
    return names or [CompletionItem(typed, type="dir")]


def complete_settings(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    """Keys of a recipe, with what they are for."""
    from click.shell_completion import CompletionItem

    from toolkit.recipe.reference import reference

    return [CompletionItem(f"{row.name}=", help=row.meaning) for row in reference() if row.name.startswith(typed)]


SET = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="a.b=v",
    shell_complete=complete_settings,
    help="Set a value of the recipe; repeatable.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else there.")
PATH = click.Path(path_type=Path)
