"""Commands about reward models and what they are used for."""

from __future__ import annotations

from typing import Any

import click

from toolkit.cli.check import known_column
from toolkit.cli.measure import DTYPE, SCORED_DATA
from toolkit.cli.options import FORCE, JSON, PATH, POSITIVE, SEED, SPLIT, emit, reporter_of, say


@click.command("filter")
@click.option("--rm", help="Score responses with this reward model.")
@click.option("--judge", help="Score them with this judge: gold, rm:, implicit: or python:, as duel judge names them.")
@click.option(
    "--data", required=True, help="Rows to filter: a .jsonl, .json, .csv or .parquet file, a hub id, or a shipped name."
)
@click.option(
    "--calibrate", required=True, metavar="DATA", help="Rows with a label, or preference data, that set the threshold."
)
@click.option(
    "--fpr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    required=True,
    help="Share of the bad responses that may be kept, as a fraction of one.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KNOWN=NAME",
    help="The column NAME holds the prompt, response, label or another KNOWN column. Can be given several times.",
)
@SPLIT
@click.option("--plain", is_flag=True, help="Read transcripts as text, for models without a chat template.")
@click.option(
    "--batch-tokens", type=POSITIVE, help="Tokens to score at once; the default is 1024 on a CPU, 16384 on a GPU."
)
@click.option("--out", type=PATH, required=True, help="File of the kept rows; the others go to *.dropped.* beside it.")
@FORCE
@DTYPE
@JSON
@click.pass_context
def filter_command(ctx: click.Context, /, rm: str | None, judge: str | None, as_json: bool, **options: Any) -> None:
    """Keep the rows whose response scores above a threshold.

    The threshold is set on labelled data, for a rate of bad responses that are kept.
    """
    from toolkit.cli.tables import filter_table
    from toolkit.measure.filter import FilterOptions, filter_rows
    from toolkit.measure.options import ScoringOptions, take

    if bool(rm) == bool(judge):
        raise click.UsageError("name a reward model with --rm, or a judge with --judge")
    reporter = reporter_of(ctx)
    options["columns"] = dict(map(known_column, options["columns"]))
    filtering, scoring = take(FilterOptions, options), take(ScoringOptions, options)
    data = options.pop("data")
    summary = filter_rows(judge or f"rm:{rm}", data, filtering, scoring, reporter=reporter, **options)
    emit(summary) if as_json else say(filter_table(summary))


@click.command("rm-card")
@click.argument("model")
@click.option("--data", help="Preference data; its gold rewards and sources are used where it has them.")
@click.option(
    "--steps", metavar="DATA", help="Labelled steps of solutions in place of --data, for a process reward model."
)
@click.option("--implicit", metavar="POLICY,REFERENCE", help="Compare it with this implicit reward.")
@click.option("--beta", type=float, help="Scale of the implicit reward; the default is as for duel rewards.")
@click.option("--any-reference", is_flag=True, help="Accept another reference than the policy was trained against.")
@click.option(
    "--by", metavar="COLUMN", help="The column with the source of each row: a table shows the accuracy by source."
)
@click.option(
    "--judge",
    help="Also measure the best of n by this judge: gold, rm:, implicit: or python:, as duel judge names them.",
)
@click.option(
    "--best-of", type=POSITIVE, metavar="N", help="Largest n; every prompt then needs N responses, 64 at most."
)
@click.option("--out", type=PATH, help="Folder for card.json and scores.parquet.")
@FORCE
@SCORED_DATA
@SEED
@DTYPE
@JSON
@click.pass_context
def rm_card(
    ctx: click.Context, /, as_json: bool, model: str, data: str | None, steps: str | None, **options: Any
) -> None:
    """Measure the quality and the biases of a reward MODEL.

    MODEL is a reward model, python:MODULE:FUNCTION (a function f(prompts, completions) of numbers), or gold. With
    --steps it is a process reward model.
    """
    from toolkit.cli.tables import card_text
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions
    from toolkit.measure.rm_card import CardOptions
    from toolkit.measure.rm_card import rm_card as make_card
    from toolkit.measure.step_card import step_card
    from toolkit.report.process import process_sheets
    from toolkit.report.sheets import text_of

    if (data is None) == (steps is None):
        raise click.UsageError("name preference data with --data, or labelled steps with --steps")
    reporter = reporter_of(ctx)
    asked, reading, scoring = take(CardOptions, options), take(ReadingOptions, options), take(ScoringOptions, options)
    if steps is not None:
        card = step_card(model, steps, asked, reading, scoring, reporter=reporter, **options)
        emit(card) if as_json else say(text_of(*process_sheets(card, card["intervals"]["confidence"])))
        return
    assert data is not None  # one of the two was named
    card = make_card(model, data, asked, reading, scoring, reporter=reporter, **options)
    emit(card) if as_json else say(card_text(card, options["out"]))


COMMANDS = (filter_command, rm_card)
