"""Commands on outputs and judgements that are there: ``duel judge`` and ``duel winrate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from toolkit.cli.check import known_column
from toolkit.cli.measure import ANNOTATIONS, DTYPE, JUDGES, LANGUAGE_MODEL, judge_options
from toolkit.cli.options import (
    FORCE,
    JSON,
    PATH,
    PROMPT_LIMIT,
    SEED,
    SEED_RANGE,
    WITH_TEXT,
    emit,
    reporter_of,
    say,
)


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--policy", help="The one policy whose responses are judged.")
@click.option("--baseline", help="The policy that every other is compared with; the default compares each with each.")
@click.option("--human", is_flag=True, help="Serve a page of blind pairs on this machine, where people vote.")
@click.option("--judge", help=f"Ask this judge: {JUDGES}")
@click.option("--annotator", default="me", show_default=True, help="Name of a voter who gives none on the page.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port of the page on 127.0.0.1; the default is a free one."
)
@LANGUAGE_MODEL
@PROMPT_LIMIT
@SEED
@click.option("--out", type=PATH, required=True, help="Parquet file of judgements to write; duel winrate reads it.")
@ANNOTATIONS
@WITH_TEXT
@FORCE
@DTYPE
@JSON
@click.pass_context
def judge(
    ctx: click.Context, /, as_json: bool, human: bool, judge: str | None, files: tuple[Path, ...], **options: Any
) -> None:
    """Judge existing outputs of two or more systems.

    FILES are a run folder or its samples.parquet, AlpacaEval's model_outputs.json, or rows of prompt and
    response.
    """
    from toolkit.cli.tables import judging_tables
    from toolkit.measure.judge import JudgedFiles, ask_people, judge_outputs
    from toolkit.measure.options import take

    if human == bool(judge):
        raise click.UsageError("name a judge with --judge, or ask people with --human")
    reporter = reporter_of(ctx)
    options["files"] = files
    outputs, asking = take(JudgedFiles, options), judge_options(options)
    voting = {name: options.pop(name) for name in ("annotator", "port")}
    if judge is None:
        results = ask_people(outputs, **voting, reporter=reporter, **options)
    else:
        results = judge_outputs(outputs, judge, asking, reporter=reporter, **options)
    if as_json:
        emit(results)
        return
    out = shlex.quote(str(options["out"]))
    say(judging_tables(results))
    following = " --human VOTES\n  corrects this judge by some votes of people" if judge else ""
    say(f"\nwritten: {out}\nNext: duel winrate {out}{following}")  # commands stay whole, to be copied


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--length-control", is_flag=True, help="Add the length-controlled win rate.")
@click.option("--lc-table", type=PATH, help="Folder with AlpacaEval's table, for its length-controlled win rate.")
@click.option("--style-control", is_flag=True, help="Add the win rate at equal length, lists, headers and bold.")
@click.option("--by", metavar="COLUMN", help="Add a row for each value of this column.")
@click.option("--attributes", type=PATH, help="File of prompts with that column, if the judgements do not have it.")
@click.option("--pool-judges", is_flag=True, help="Add all judges together, averaged inside each prompt.")
@click.option("--ranking", is_flag=True, help="Add Bradley-Terry strengths of three or more policies.")
@click.option(
    "--reference",
    metavar="JUDGE",
    help="Measure the other judges against this one; the default is gold, if it is there.",
)
@click.option(
    "--human",
    type=PATH,
    metavar="VOTES",
    help="File with people's votes on some of the prompts: correct the judges by them (prediction-powered inference).",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KNOWN=NAME",
    help="Read the column NAME as prompt, model_a, model_b, response_a, response_b, winner or judge. Can be given "
    "several times.",
)
@click.option(
    "--bootstrap",
    "n_resamples",
    type=click.IntRange(100),
    show_default="as the files record, else 2000",
    help="Bootstrap resamples of the prompts for each interval.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
    show_default="as the files record, else 0.95",
    help="Coverage of each interval.",
)
@click.option("--seed", type=SEED_RANGE, show_default="as the files record, else 0", help="Seed of the resamples.")
@JSON
def winrate(
    files: tuple[Path, ...],
    as_json: bool,
    length_control: bool,
    style_control: bool,
    lc_table: Path | None,
    columns: tuple[str, ...],
    **options: Any,
) -> None:
    """Show win rates of recorded judgements.

    FILES are our Parquet or JSONL files of judgements, AlpacaEval's annotations.json, or pairs with a winner in columns
    as those of Chatbot Arena, MT-bench, Arena-Hard, PandaLM and preference sets. The columns that were read are named.

    The file of a run gives the run's own intervals: it records how they were computed.
    """
    from toolkit.cli.tables import judging_tables
    from toolkit.evals.length_control import load_length_table
    from toolkit.judging.win_rates import Controls, winrate_report

    table = load_length_table(lc_table) if lc_table is not None else None
    controls = Controls(length=length_control or table is not None, style=style_control, table=table)
    # What is not asked for is as the files record it.
    asked = {name: value for name, value in options.items() if value is not None}
    results = winrate_report(files, controls=controls, columns=dict(map(known_column, columns)), **asked)
    emit(results) if as_json else say(judging_tables(results))


COMMANDS = (judge, winrate)
