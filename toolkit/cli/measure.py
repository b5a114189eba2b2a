"""Commands that measure: rewards of data, samples of policies, judgements and what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toolkit.cli.options import JSON, PATH, emit, quiet_libraries, reporter_of


def _dtype(function: Any) -> Any:
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Precision of the forward passes.",
    )(function)


def _asking(function: Any) -> Any:
    for option in (
        click.option("--template", help="What llm: and openai: are asked: choice, score, logprob, or a YAML file."),
        click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Requests at once."),
        click.option(
            "--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Seconds."
        ),
        click.option(
            "--price", type=click.FloatRange(0), nargs=2, metavar="IN OUT", help="USD per million tokens, for the sum."
        ),
    ):
        function = option(function)
    return function


def _judge_options(options: dict[str, Any]) -> Any:
    """Takes the options of :func:`_asking` and :func:`_dtype` out of ``options``."""
    from toolkit.judging.options import JudgeOptions
    from toolkit.recipe.schema import JudgeSettings, ModelSection

    prices = options.pop("price") or (None, None)
    settings = JudgeSettings(
        template=options.pop("template"),
        concurrency=options.pop("concurrency"),
        timeout_s=options.pop("timeout"),
        prompt_price_usd=prices[0],
        completion_price_usd=prices[1],
    )
    return JudgeOptions(ModelSection(dtype=options.pop("dtype")), settings)


def _sampling_params(n: str, options: dict[str, Any]) -> Any:
    """Takes the options of sampling out of ``options``; ``n`` names the one with the number of responses."""
    from toolkit.engine.sampling import SamplingParams

    return SamplingParams(options.pop("max_new_tokens"), options.pop("temperature"), options.pop(n))


def _reading(function: Any) -> Any:
    for option in (
        click.option("--limit", type=click.IntRange(1), help="Use so many prompts."),
        click.option("--split", default="train", show_default=True, help="Split of a hub data set."),
        click.option("--plain", is_flag=True, help="Read transcripts as text: for models without a chat template."),
        click.option("--max-prompt-tokens", type=click.IntRange(1), default=2048, show_default=True),
        click.option("--max-response-tokens", type=click.IntRange(1), default=1024, show_default=True),
        click.option("--batch-tokens", type=click.IntRange(1), help="Tokens at once; 1024 on a CPU, 16384 on a GPU."),
    ):
        function = option(function)
    return function


def _sampling(*, k: int, max_new_tokens: int) -> Any:
    """Options of a command that samples a policy and writes preference data."""

    def add(function: Any) -> Any:
        for option in (
            click.option("--force", is_flag=True, help="Overwrite the file."),
            click.option("--out", type=PATH, required=True, help="A .jsonl.gz to write; data.source reads it."),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--split", default="train", show_default=True, help="Split of a hub data set."),
            click.option("--limit", type=click.IntRange(1), help="Use so many prompts."),
            click.option("--max-new-tokens", type=click.IntRange(1), default=max_new_tokens, show_default=True),
            click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True),
            click.option(
                "--k", type=click.IntRange(2), default=k, show_default=True, help="Responses per prompt to sample."
            ),
        ):
            function = option(function)
        return function

    return add


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(summary)
    else:
        print("\n".join(f"{name:24} {value}" for name, value in summary.items()))


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("launch", nargs=-1, type=click.UNPROCESSED)
@click.option("--policy", required=True, help="The trained policy.")
@click.option("--reference", required=True, help="What it was trained from, or none.")
@click.option("--data", required=True, help="Preference data.")
@click.option("--beta", type=float, help="Default: the policy's own, where known, else 0.1.")
@click.option("--per-token", is_flag=True, help="Add the rewards of the tokens, and their running sum.")
@click.option("--samples", type=PATH, help="A run's samples.parquet: with --rm, the check on what its policies wrote.")
@click.option("--with-ids", is_flag=True, help="Add the token ids.")
@click.option("--rm", help="An explicit reward model to check against.")
@click.option("--out", type=PATH, required=True, help="Parquet file to write.")
@click.option("--any-reference", is_flag=True, help="Accept a reference other than the one trained against.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_reading
@_dtype
@JSON
@click.pass_context
def rewards(ctx: click.Context, launch: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Implicit rewards beta * log(pi/pi_ref) of every response; with --rm, the check against the explicit RM.

    What follows -- goes to `accelerate launch`, whose processes share the work.
    """
    if launch:
        if "--" not in sys.argv:
            raise click.UsageError(f"unexpected argument {launch[0]!r}")
        from toolkit.runs.launch import accelerate_launch

        sys.exit(accelerate_launch(launch, "toolkit.cli", sys.argv[1 : sys.argv.index("--")]))
    from toolkit.cli.tables import rewards_table
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions
    from toolkit.measure.rewards import RewardOptions, implicit_rewards

    reporter = reporter_of(ctx)
    quiet_libraries()
    groups = [take(kind, options) for kind in (RewardOptions, ReadingOptions, ScoringOptions)]
    summary = implicit_rewards(
        options.pop("policy"), options.pop("reference"), options.pop("data"), *groups, reporter=reporter, **options
    )
    if summary:  # of several processes, the main one's
        emit(summary) if as_json else print(rewards_table(summary))


@click.command()
@click.option("--rm", required=True, help="The reward model.")
@click.option("--data", required=True, help="Preference data.")
@click.option("--out", type=PATH, required=True, help="Parquet file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_reading
@_dtype
@JSON
@click.pass_context
def score(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Explicit rewards of every response."""
    from toolkit.cli.tables import rewards_table
    from toolkit.measure.explicit import explicit_rewards
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions

    reporter = reporter_of(ctx)
    quiet_libraries()
    groups = [take(kind, options) for kind in (ReadingOptions, ScoringOptions)]
    summary = explicit_rewards(options.pop("rm"), options.pop("data"), *groups, reporter=reporter, **options)
    emit(summary) if as_json else print(rewards_table(summary))


@click.command()
@click.argument("policies", nargs=-1, required=True)
@click.option("--data", required=True, help="Prompts: preference data, a .jsonl with a prompt column, or a .txt.")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    required=True,
    help="gold, rm:MODEL, implicit:P,R, llm:MODEL, openai:MODEL@BASE_URL, python:M:F, file:PATH.",
)
@_asking
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--annotations", type=PATH, help="Write AlpacaEval's annotations.json (or .json.gz) as well.")
@click.option("--samples-per-prompt", type=click.IntRange(1), default=1, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Use so many prompts.")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--seed", type=int, default=0, show_default=True)
@_dtype
@JSON
@click.pass_context
def compare(ctx: click.Context, as_json: bool, policies: tuple[str, ...], **options: Any) -> None:
    """Sample POLICIES (two or more) on the same prompts, judge them, and give win rates."""
    from toolkit.cli.tables import judging_tables
    from toolkit.measure.compare import compare_policies
    from toolkit.measure.options import PromptSelection, take

    if len(policies) < 2:
        raise click.UsageError("name at least two policies to compare")
    reporter = reporter_of(ctx)
    quiet_libraries()
    judge_options, params = _judge_options(options), _sampling_params("samples_per_prompt", options)
    selection, judges = take(PromptSelection, options), options.pop("judges")
    results = compare_policies(policies, judges, selection, params, judge_options, reporter=reporter, **options)
    emit(results) if as_json else print(judging_tables(results))


@click.command()
@click.argument("samples", type=PATH)
@click.option("--policy", required=True, help="Whose responses are judged.")
@click.option("--baseline", required=True, help="Against whose.")
@click.option("--human", is_flag=True, help="Serve a page of blind pairs on this machine, for people to vote on.")
@click.option(
    "--judge",
    help="Or ask a judge: gold, rm:MODEL, implicit:P,R, llm:MODEL, openai:MODEL@BASE_URL, python:M:F, file:PATH.",
)
@click.option("--annotator", default="me", show_default=True, help="Who votes where the page is not told a name.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the page; 0 takes a free one.")
@_asking
@click.option("--limit", type=click.IntRange(1), help="Judge so many prompts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of pairs and places.")
@click.option("--out", type=PATH, required=True, help="Parquet file of judgements to write; duel winrate reads it.")
@click.option("--annotations", type=PATH, help="Write AlpacaEval's annotations.json (or .json.gz) as well.")
@_dtype
@JSON
@click.pass_context
def judge(ctx: click.Context, as_json: bool, human: bool, judge: str | None, **options: Any) -> None:
    """Judge recorded SAMPLES: a run folder, or its samples.parquet."""
    from toolkit.cli.tables import judging_tables
    from toolkit.measure.judge import SampledPair, ask_people, judge_samples
    from toolkit.measure.options import take

    if human == bool(judge):
        raise click.UsageError("name a judge with --judge, or ask people with --human")
    reporter = reporter_of(ctx)
    quiet_libraries()
    pair, judge_options = take(SampledPair, options), _judge_options(options)
    voting = {name: options.pop(name) for name in ("annotator", "port")}
    if judge is None:
        results = ask_people(pair, **voting, reporter=reporter, **options)
    else:
        results = judge_samples(pair, judge, judge_options, reporter=reporter, **options)
    emit(results) if as_json else print(judging_tables(results))


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--length-control", is_flag=True, help="Add the length-controlled win rate.")
@click.option("--lc-table", type=PATH, help="AlpacaEval's auxiliary table (a folder).")
@click.option("--style-control", is_flag=True, help="Add the win rate at equal length, lists, headers and bold.")
@click.option("--by", metavar="COLUMN", help="Slices: a row for each value of this column as well.")
@click.option("--attributes", type=PATH, help="File of prompts that holds the column, if the judgements do not.")
@click.option("--pool-judges", is_flag=True, help="Add all judges together, averaged inside each prompt.")
@click.option("--ranking", is_flag=True, help="Add Bradley-Terry strengths of three or more policies.")
@click.option("--reference", metavar="JUDGE", help="Measure the other judges against this one; default gold, if there.")
@click.option(
    "--bootstrap", "n_resamples", type=click.IntRange(100), default=2000, show_default=True, help="Resamples."
)
@click.option(
    "--confidence", type=click.FloatRange(0.5, 1, min_open=True, max_open=True), default=0.95, show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True)
@JSON
def winrate(
    files: tuple[Path, ...],
    as_json: bool,
    length_control: bool,
    style_control: bool,
    lc_table: Path | None,
    **options: Any,
) -> None:
    """Win rates of recorded judgements: our Parquet/JSONL, or AlpacaEval's annotations.json."""
    from toolkit.cli.tables import judging_tables
    from toolkit.evals.length_control import load_length_table
    from toolkit.judging.win_rates import Controls, winrate_report

    table = load_length_table(lc_table) if lc_table is not None else None
    controls = Controls(length=length_control or table is not None, style=style_control, table=table)
    found = winrate_report(files, controls=controls, **options)
    emit(found) if as_json else print(judging_tables(found, options["confidence"]))


@click.command()
@click.option("--data", required=True, help="Responses to label: preference data, or a run folder's samples.")
@click.option("--policy", help="Sample the responses from this policy; --data then gives the prompts.")
@click.option("--judge", required=True, help="llm:MODEL or openai:MODEL@BASE_URL.")
@click.option("--principles", required=True, help="hhh (shipped), or a file: one on each line, or a YAML list.")
@click.option(
    "--draw", type=click.Choice(["one", "all"]), default="one", show_default=True, help="Per comparison; all: a vote."
)
@click.option("--labels", type=click.Choice(["soft", "hard"]), default="soft", show_default=True)
@_asking
@_sampling(k=4, max_new_tokens=128)
@_dtype
@JSON
@click.pass_context
def label(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Preference data by written principles: a language model compares the responses to each prompt."""
    from toolkit.judging.principles import Labelling, load_principles
    from toolkit.measure.label import label_data
    from toolkit.measure.options import PromptSelection, take
    from toolkit.measure.sampling import PolicySampler

    reporter = reporter_of(ctx)
    quiet_libraries()
    selection, params = take(PromptSelection, options), _sampling_params("k", options)
    judge_options = _judge_options(options)
    labelling = Labelling(
        options.pop("judge"),
        load_principles(options.pop("principles")),
        judge_options,
        draw=options.pop("draw"),
        labels=options.pop("labels"),
        seed=selection.seed,
    )
    policy = options.pop("policy")
    sampler = PolicySampler(policy, judge_options.model, params) if policy is not None else None
    _show(label_data(labelling, selection, sampler=sampler, reporter=reporter, **options), as_json)


@click.command()
@click.option("--policy", default="smollm2-135m", show_default=True, help="The policy to sample responses from.")
@click.option("--data", required=True, help="Prompts: preference data, a .jsonl with a prompt column, or a .txt.")
@_sampling(k=6, max_new_tokens=40)
@_dtype
@JSON
@click.pass_context
def simulate(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Preference data from a policy, the known gold reward, and three biased, noisy annotators."""
    from toolkit.measure.options import PromptSelection, take
    from toolkit.measure.sampling import PolicySampler
    from toolkit.measure.simulate import simulate_data
    from toolkit.recipe.schema import ModelSection

    reporter = reporter_of(ctx)
    quiet_libraries()
    selection, params = take(PromptSelection, options), _sampling_params("k", options)
    sampler = PolicySampler(options.pop("policy"), ModelSection(dtype=options.pop("dtype")), params)
    _show(simulate_data(sampler, selection, reporter=reporter, **options), as_json)


COMMANDS = (rewards, score, compare, judge, winrate, label, simulate)
