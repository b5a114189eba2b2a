"""What comes next, as the end of what a command prints: a command to copy stays whole, on a line of its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from toolkit.cli.options import wrapped

if TYPE_CHECKING:
    from toolkit.recipe.schema import Recipe

# Settings that say which data a run read, and how long its texts may be.
OF_THE_DATA = (
    *(f"data.{name}" for name in ("source", "config", "split", "revision", "eval_source", "eval_split")),
    *(f"data.{name}" for name in ("columns", "conversational", "annotators")),
)
# How a model is loaded and data is read, which the next command does again.
REPEATED = ("split", "plain", "max_prompt_tokens", "max_response_tokens", "batch_tokens", "dtype", "trust_remote_code")
LENGTHS = ("data.max_prompt_tokens", "data.max_response_tokens", "evaluate.max_new_tokens")


def next_study(recipe: str, run: Recipe, judged: bool, sets: Sequence[str] = ()) -> tuple[str, str]:
    """The end of ``duel run``: how to go from one run to a study, as a sentence and a command.

    ``recipe`` is what the user typed, ``judged`` whether a judge decided. A recipe without a section ``study`` has no
    study of its own: the shipped one is named, with this run's data, lengths and judges, and its model, unless the
    recipe only demonstrates. ``sets`` are the settings that the user gave beside the recipe. Where a run lies in the
    study's default folder, the command names another one.

    >>> from toolkit.recipe.files import load_recipe
    >>> own = ["data.source=pairs.jsonl", "data.max_prompt_tokens=512"]
    >>> next_study("mine.yaml", load_recipe("quickstart", own).recipe, judged=True)[1]
    'duel study study --set data.source=pairs.jsonl --set data.max_prompt_tokens=512'
    >>> next_study("smoke", load_recipe("smoke", own).recipe, judged=False)[1]
    "duel study study --set data.source=pairs.jsonl --set data.max_prompt_tokens=512 --set 'evaluate.judges=[JUDGE]'"
    >>> next_study("study", load_recipe("study").recipe, judged=True)[1]
    'duel study study'
    """
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.schema import flat
    from toolkit.recipe.yaml_values import one_line
    from toolkit.runs.kinds import kind_of

    words = [recipe, *(word for text in sets for word in ("--set", text))]
    if run.study is None:
        own, shipped = flat(run), flat(load_recipe("study").recipe)
        # Recorded votes are of other texts than those that a study samples.
        own["evaluate.judges"] = [judge for judge in run.evaluate.judges if not judge.startswith("file:")]
        judged = judged and bool(own["evaluate.judges"] or not run.evaluate.judges)
        kept = (*([] if run.evaluate.demonstration else ["model.name"]), *OF_THE_DATA, "evaluate.judges")
        names = [name for name in kept if own[name] != shipped[name]]
        names += [name for name in LENGTHS if own[name] is not None and own[name] > shipped[name]]  # type: ignore[operator]
        given = [f"{name}={one_line(own[name])}" for name in names]
        words = ["study", *(word for text in given for word in ("--set", text))]
    if not (judged or "evaluate.judges" in " ".join(words)):
        words += ["--set", "evaluate.judges=[JUDGE]"]
    default = Path("runs") / (run.name if run.study is not None else words[0])
    if kind_of(default) not in (None, "study"):
        words += ["--out", f"{default}-study"]
    said = "One run is one seed of one setting. For a verdict over seeds, settings and equal KL:"
    return said, shlex.join(["duel", "study", *words])


def next_recipe(source: str) -> str:
    """What to do with a file of preference data."""
    return wrapped(f"Next: a recipe with data.source: {source} (duel recipes copy quickstart mine.yaml)")


def repeated(ctx: click.Context, command: str) -> list[str]:
    """The options in ``REPEATED`` that the user gave, in the words for another ``command``, if it has them."""
    known = {parameter.name for parameter in cast(click.Group, ctx.find_root().command).commands[command].params}
    words = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in REPEATED and name in known and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = isinstance(parameter, click.Option) and parameter.is_flag
            words += [parameter.opts[0], *([] if flag else [str(ctx.params[name])])]
    return words


def next_of_scores(ctx: click.Context, rm: str, data: str, compared: bool) -> str:
    """The last lines of ``duel score``: a command, whole, to be copied, and what it is for. ``compared``: whether the
    data says which responses are better.
    """
    if compared:
        card = shlex.join(["duel", "rm-card", rm, "--data", data, *repeated(ctx, "rm-card")])
        return f"Next: {card}\n  measures the reward model's accuracy and its biases"
    out = "good.parquet" if data.endswith(".parquet") else "good.jsonl"
    scored = shlex.join(["duel", "filter", "--rm", rm, "--data", data, *repeated(ctx, "filter")])
    told = "keeps the good responses; LABELS is a file with a label for some"
    return f"Next: {scored} --calibrate LABELS --fpr 0.1 --out {out}\n  {told}"
