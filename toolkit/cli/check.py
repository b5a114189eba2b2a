"""``duel check``: what is valid but wrong in preference data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolkit.cli.options import JSON, PATH, POSITIVE, SEED, SPLIT, emit, reporter_of, say, wrapped


@click.command()
@click.argument("data")
@click.option("--model", required=True, help="The model whose tokenizer and chat template the data meets.")
@click.option("--held-out", metavar="DATA", help="Held-out data: its prompts must not be among those of DATA.")
@click.option("--held-out-split", metavar="SPLIT", help="Split of the held-out data; the default is --split.")
@click.option(
    "--max-prompt-tokens", type=POSITIVE, default=512, show_default=True, help="As data.max_prompt_tokens of a recipe."
)
@click.option(
    "--max-response-tokens",
    type=POSITIVE,
    default=256,
    show_default=True,
    help="As data.max_response_tokens of a recipe.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KNOWN=NAME",
    help="Read the column NAME as the column KNOWN of a format (data.columns). Can be given several times.",
)
@click.option(
    "--conversational/--plain",
    default=None,
    help="Read transcripts and text prompts as chat messages, or as text. The default decides by the data.",
)
@click.option("--annotator", "annotators", multiple=True, help="Use the comparisons of this annotator only.")
@click.option("--config", help="Configuration of a hub data set.")
@click.option("--chat-template", type=PATH, help="Jinja file that replaces the model's chat template.")
@click.option("--limit", type=POSITIVE, metavar="N", help="Check only the first N rows.")
@click.option(
    "--likelihood",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Also score N rows, drawn at random, with the model (off_policy).",
)
@SPLIT
@SEED
@JSON
@click.pass_context
def check(ctx: click.Context, /, data: str, model: str, as_json: bool, **options: Any) -> None:
    """Find problems in preference DATA, for a model.

    It finds labels that follow the length, repeated prompts, a template without an end, and more. Each finding has its
    rows (lines of a .jsonl file, else rows, from 1), an example, and what to do. The exit code is 2 where duel run
    would refuse the data.
    """
    from toolkit.cli.next_steps import next_recipe
    from toolkit.errors import DataError
    from toolkit.evals.words import counted
    from toolkit.measure.check.check import CheckOptions, check_data
    from toolkit.measure.check.rows import SourceOptions
    from toolkit.measure.check.tokens import Limits
    from toolkit.measure.options import take

    if options["held_out_split"] and not options["held_out"]:
        raise click.UsageError("--held-out-split is the split of --held-out: name that, too")
    reporter_of(ctx)
    options["columns"] = dict(map(known_column, options["columns"]))
    options["annotators"] = options["annotators"] or None
    template: Path | None = options.pop("chat_template")
    source, limits = take(SourceOptions, options), take(Limits, options)
    result = check_data(
        data, model, CheckOptions(source, limits, chat_template=str(template) if template else None, **options)
    )
    emit(result.as_dict()) if as_json else say(wrapped(str(result)))
    if not (as_json or result.n_refused):
        say("\n" + next_recipe(data))
    if result.n_refused:
        raise DataError(
            f"duel run refuses this data for {counted(result.n_refused, 'row')}",
            where=data,
            fix="correct the rows that the findings name, or leave them out",
        )


def known_column(text: str) -> tuple[str, str]:
    """A ``--column``: the name that is known, and the one in the data."""
    known, equals, name = text.partition("=")
    if not (known and equals and name):
        raise click.BadParameter(f"{text!r} is not KNOWN=NAME", param_hint="--column")
    return known, name


COMMANDS = (check,)
