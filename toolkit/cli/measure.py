"""Commands that measure: rewards of data, samples of policies, judgements and what they say."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli.options import (
    FORCE,
    JSON,
    PATH,
    POSITIVE,
    PROMPT_LIMIT,
    SEED,
    SPLIT,
    WITH_TEXT,
    Decorator,
    emit,
    group,
    reporter_of,
    say,
)

if TYPE_CHECKING:
    from toolkit.engine.sampling import SamplingParams
    from toolkit.judging.options import JudgeOptions
    from toolkit.measure.sampling import PolicySampler
    from toolkit.recipe.training import ModelSection

JUDGES = (
    "gold, rm:MODEL, implicit:POLICY,REFERENCE, llm:MODEL, openai:MODEL@BASE_URL, python:MODULE:FUNCTION, file:PATH."
)
PROMPTS = "Source of the prompts: preference data, a .jsonl with a prompt column, or a .txt."


def _allow_remote_code(ctx: click.Context, parameter: click.Parameter, allowed: bool) -> None:
    if allowed:
        from toolkit.models.remote_code import remote_code

        ctx.with_resource(remote_code(True))  # for the rest of this command, not of the process


DTYPE = group(
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Precision of the forward passes.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        expose_value=False,
        callback=_allow_remote_code,
        help="Run the Python code in a model's folder. Read it first: it can do whatever you can.",
    ),
)
TEMPERATURE = click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of sampling.",
)
ANNOTATIONS = click.option(
    "--annotations", type=PATH, help="Also write AlpacaEval's annotations.json (or .json.gz) to this file."
)
LANGUAGE_MODEL = group(
    click.option(
        "--template", help="What a language model is asked: choice, score, logprob, or a YAML file of your own."
    ),
    click.option(
        "--concurrency",
        type=POSITIVE,
        default=8,
        show_default=True,
        help="Requests that an endpoint gets at the same time.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=60.0,
        show_default=True,
        help="Seconds to wait for an answer before asking again.",
    ),
    click.option(
        "--price",
        type=click.FloatRange(0),
        nargs=2,
        metavar="IN OUT",
        help="Price of a million prompt and completion tokens in USD, to count the cost.",
    ),
)
SCORED_DATA = group(
    PROMPT_LIMIT,
    SPLIT,
    click.option("--plain", is_flag=True, help="Read transcripts as text, for models without a chat template."),
    click.option(
        "--max-prompt-tokens", type=POSITIVE, default=2048, show_default=True, help="Leave out longer prompts."
    ),
    click.option("--max-response-tokens", type=POSITIVE, default=1024, show_default=True, help="Cut longer responses."),
    click.option(
        "--batch-tokens", type=POSITIVE, help="Tokens to score at once; the default is 1024 on a CPU, 16384 on a GPU."
    ),
)


def max_new_tokens(default: int) -> Decorator:
    return click.option(
        "--max-new-tokens", type=POSITIVE, default=default, show_default=True, help="Longest sample in tokens."
    )


def sampled_data(*, k: int, longest: int) -> Decorator:
    """Options of a command that samples a policy and writes preference data."""
    return group(
        click.option(
            "--k", type=click.IntRange(2), default=k, show_default=True, help="Responses to sample for a prompt."
        ),
        TEMPERATURE,
        max_new_tokens(longest),
        PROMPT_LIMIT,
        SPLIT,
        SEED,
        click.option("--out", type=PATH, required=True, help="File to write (.jsonl.gz); data.source can read it."),
        FORCE,
    )


def judge_options(options: dict[str, Any]) -> JudgeOptions:
    """Takes ``LANGUAGE_MODEL`` and ``DTYPE`` out of the options."""
    from toolkit.judging.options import JudgeOptions
    from toolkit.recipe.schema import JudgeSettings
    from toolkit.recipe.training import ModelSection

    prices = options.pop("price") or (None, None)
    settings = JudgeSettings(
        template=options.pop("template"),
        concurrency=options.pop("concurrency"),
        timeout_s=options.pop("timeout"),
        prompt_price_usd=prices[0],
        completion_price_usd=prices[1],
    )
    return JudgeOptions(ModelSection(dtype=options.pop("dtype")), settings)


def sampling_params(n: str, options: dict[str, Any]) -> SamplingParams:
    """Takes the options of sampling out of the options. ``n`` names the one with the number of responses."""
    from toolkit.engine.sampling import SamplingParams

    return SamplingParams(options.pop("max_new_tokens"), options.pop("temperature"), options.pop(n))


def policy_sampler(policy: str | None, model: ModelSection, options: dict[str, Any]) -> PolicySampler | None:
    """Takes the options of sampling out of the options. None where no policy is sampled: that needs no torch."""
    from toolkit.measure.sampling import PolicySampler

    if policy is not None:
        return PolicySampler(policy, model, sampling_params("k", options))
    for name in ("max_new_tokens", "temperature", "k"):
        del options[name]
    return None


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("launch", nargs=-1, type=click.UNPROCESSED)
@click.option("--policy", required=True, help="The trained policy.")
@click.option("--reference", required=True, help="The policy that training started from, or none.")
@click.option("--data", required=True, help="Preference data, rows of prompt and response, or a run's samples.")
@click.option(
    "--beta", type=float, help="Scale of the rewards; the default is what the policy was trained with, or 0.1."
)
@click.option("--per-token", is_flag=True, help="Add the reward of each token, and the running sum.")
@click.option(
    "--samples",
    type=PATH,
    help="A run's samples.parquet: with --rm, also check the rewards of its policies' samples.",
)
@click.option(
    "--shift",
    "shifts",
    multiple=True,
    metavar="NAME:FILE",
    help="Also measure the accuracy on shifted comparisons: those in FILE, or a built-in shift (case, whitespace, "
    "list, courtesy, truncated or swapped). Can be given several times.",
)
@click.option("--with-ids", is_flag=True, help="Add the token ids.")
@WITH_TEXT
@click.option("--rm", help="Check the rewards against this explicit reward model.")
@click.option("--out", type=PATH, required=True, help="Parquet file to write.")
@click.option("--any-reference", is_flag=True, help="Accept another reference than the policy was trained against.")
@FORCE
@SCORED_DATA
@DTYPE
@JSON
@click.pass_context
def rewards(ctx: click.Context, /, launch: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compute implicit rewards, beta * log(pi/pi_ref).

    Every response of the data gets one. With --rm, they are checked against an explicit reward model.

    Arguments after -- go to `accelerate launch`, whose processes share the work.
    """
    if launch:
        if "--" not in sys.argv:
            raise click.UsageError(f"unexpected argument {launch[0]!r}")
        from toolkit.errors import RecipeError
        from toolkit.runs.launch import accelerate_launch, launch_of

        if launch_of(launch).sharding is not None:
            what = "no model is trained here: the processes share the responses, and each holds whole models"
            raise RecipeError(what, where="--use_fsdp", fix="leave FSDP out")
        sys.exit(accelerate_launch(launch, "toolkit.cli", sys.argv[1 : sys.argv.index("--")]))
    from toolkit.cli.tables import rewards_table
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions
    from toolkit.measure.rewards import RewardOptions, implicit_rewards

    reporter = reporter_of(ctx)
    summary = implicit_rewards(
        options.pop("policy"),
        options.pop("reference"),
        options.pop("data"),
        take(RewardOptions, options),
        take(ReadingOptions, options),
        take(ScoringOptions, options),
        reporter=reporter,
        **options,
    )
    if summary:  # of several processes, the main one's
        emit(summary) if as_json else say(rewards_table(summary))


@click.command()
@click.option("--rm", required=True, help="The reward model.")
@click.option("--data", required=True, help="Preference data, rows of prompt and response, or a run's samples.")
@click.option("--out", type=PATH, required=True, help="Parquet file to write.")
@WITH_TEXT
@FORCE
@SCORED_DATA
@DTYPE
@JSON
@click.pass_context
def score(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compute the explicit reward of every response."""
    from toolkit.cli.next_steps import next_of_scores
    from toolkit.cli.tables import rewards_table
    from toolkit.measure.explicit import explicit_rewards
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions

    reporter = reporter_of(ctx)
    reading, scoring = take(ReadingOptions, options), take(ScoringOptions, options)
    rm, data = options.pop("rm"), options.pop("data")
    summary = explicit_rewards(rm, data, reading, scoring, reporter=reporter, **options)
    if as_json:
        emit(summary)
        return
    say(rewards_table(summary))
    say(next_of_scores(ctx, rm, data, summary["accuracy"] is not None))


@click.command()
@click.argument("policies", nargs=-1, required=True)
@click.option("--data", required=True, help=PROMPTS)
@click.option("--judge", "judges", multiple=True, required=True, help=f"Judge; can be given several times: {JUDGES}")
@LANGUAGE_MODEL
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@ANNOTATIONS
@click.option(
    "--samples-per-prompt",
    type=POSITIVE,
    default=1,
    show_default=True,
    help="Responses that each policy samples for a prompt.",
)
@TEMPERATURE
@max_new_tokens(128)
@PROMPT_LIMIT
@SPLIT
@SEED
@DTYPE
@JSON
@click.pass_context
def compare(ctx: click.Context, /, as_json: bool, policies: tuple[str, ...], **options: Any) -> None:
    """Sample two or more POLICIES, judge them, and show win rates.

    Every policy answers the same prompts.
    """
    from toolkit.cli.tables import judging_tables
    from toolkit.measure.compare import compare_policies
    from toolkit.measure.options import PromptSelection, take
    from toolkit.runs.store import JUDGEMENTS_FILE

    if len(policies) < 2:
        raise click.UsageError("name at least two policies to compare")
    reporter = reporter_of(ctx)
    asking, params = judge_options(options), sampling_params("samples_per_prompt", options)
    selection, judges = take(PromptSelection, options), options.pop("judges")
    results = compare_policies(policies, judges, selection, params, asking, reporter=reporter, **options)
    if as_json:
        emit(results)
        return
    judged = shlex.quote(str(options["out"] / JUDGEMENTS_FILE))
    say(judging_tables(results))
    say(f"\nwritten: {options['out']}\nNext: duel winrate {judged} --length-control")  # whole, to be copied


@click.command()
@click.option("--data", required=True, help="Responses to label: preference data, or a run folder's samples.")
@click.option("--policy", help="Sample the responses from this policy; --data gives the prompts.")
@click.option(
    "--judge",
    required=True,
    help="A language model (llm:MODEL, openai:MODEL@BASE_URL), or a judge that scores: rm:MODEL, "
    "implicit:POLICY,REFERENCE, python:MODULE:FUNCTION, gold.",
)
@click.option(
    "--principles",
    help="For a language model: hhh (shipped), or a file with a principle on each line, or a YAML list.",
)
@click.option(
    "--draw",
    type=click.Choice(["one", "all"]),
    default="one",
    show_default=True,
    help="Principles for a comparison: one, drawn at random, or all, by vote.",
)
@click.option(
    "--labels",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    show_default=True,
    help="soft: probabilities (of judges that score, rm: and implicit: give them); hard: winners.",
)
@LANGUAGE_MODEL
@sampled_data(k=4, longest=128)
@DTYPE
@JSON
@click.pass_context
def label(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Make preference data with a judge.

    A language model compares the responses to each prompt by written principles; another judge scores them.
    """
    from toolkit.cli.tables import labels_table
    from toolkit.judging.principles import Labelling, load_principles
    from toolkit.measure.label import label_data
    from toolkit.measure.options import PromptSelection, take

    reporter = reporter_of(ctx)
    selection = take(PromptSelection, options)
    asking, principles = judge_options(options), options.pop("principles")
    labelling = Labelling(
        options.pop("judge"),
        load_principles(principles) if principles is not None else [],
        asking,
        draw=options.pop("draw"),
        labels=options.pop("labels"),
        seed=selection.seed,
    )
    sampler = policy_sampler(options.pop("policy"), asking.model, options)
    summary = label_data(labelling, selection, sampler=sampler, reporter=reporter, **options)
    emit(summary) if as_json else say(labels_table(summary))


@click.command()
@click.option(
    "--policy",
    show_default="smollm2-135m",
    help="Sample the responses from this policy; with --annotators the default is the data's responses, if it has any.",
)
@click.option("--data", required=True, help=PROMPTS)
@click.option(
    "--annotators",
    type=PATH,
    metavar="FILE",
    help="YAML or JSON list of annotators: name, noise, bias, weight, flipped, ties. The default is three of them.",
)
@sampled_data(k=6, longest=40)
@DTYPE
@JSON
@click.pass_context
def simulate(ctx: click.Context, /, as_json: bool, policy: str | None, annotators: Path | None, **options: Any) -> None:
    """Make preference data from responses and a known gold reward.

    Annotators compare the responses; each is biased and noisy in its own way.
    """
    from toolkit.cli.tables import simulation_table
    from toolkit.measure.annotators import read_annotators
    from toolkit.measure.options import PromptSelection, take
    from toolkit.measure.simulate import policy_to_sample, simulate_data
    from toolkit.preferences.simulate import ANNOTATORS
    from toolkit.recipe.training import ModelSection

    reporter = reporter_of(ctx)
    people = read_annotators(annotators) if annotators is not None else list(ANNOTATORS)
    selection, model = take(PromptSelection, options), ModelSection(dtype=options.pop("dtype"))
    sampled = policy_to_sample(policy, selection, prefer_own=annotators is not None)
    sampler = policy_sampler(sampled, model, options)
    summary = simulate_data(sampler, selection, people, reporter=reporter, **options)
    emit(summary) if as_json else say(simulation_table(summary))


COMMANDS = (rewards, score, compare, label, simulate)
