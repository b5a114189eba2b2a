"""Policies from Python: sampled and judged, compared by win rates, and preference data from their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.api.inputs import DTYPES, Data, Dtype, Inputs, Judge, Model, one_of, placed, quietly
from toolkit.api.results import Result
from toolkit.progress import Reporter
from toolkit.report.judging_sheets import judging_notes, judging_sheets

if TYPE_CHECKING:
    from toolkit.judging.options import JudgeOptions
    from toolkit.measure.sampling import PolicySampler
    from toolkit.preferences.simulate import Annotator
    from toolkit.recipe.training import ModelSection


@quietly
def compare(
    *policies: Model,
    data: Data,
    judge: Judge | Sequence[Judge],
    out: str | Path | None = None,
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
    template: str | None = None,
    dtype: Dtype = "float32",
    reporter: Reporter | None = None,
) -> Result:
    """``duel compare``: sample two or more policies on the same prompts, judge the samples, and compute win rates.

    Args:
        policies: two or more models.
        data: the source of the prompts; a list of texts will do.
        judge: one judge, or several; a function f(prompts, completions) of numbers is one.
        out: a folder to write; without it no file remains.
        samples_per_prompt: responses that each policy samples for a prompt.
        temperature: of sampling.
        max_new_tokens: the longest sample in tokens.
        limit: use only so many prompts.
        split: of a data set on the hub.
        seed: of everything that is random.
        template: what a language model is asked: choice, score, logprob, or a YAML file.
        dtype: precision of the forward passes.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel compare --json`` prints, with ``win_rates``, and the samples under ``samples``.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.engine.sampling import SamplingParams
    from toolkit.files import read_table
    from toolkit.measure.compare import compare_policies
    from toolkit.measure.options import PromptSelection

    judges = [judge] if isinstance(judge, str) or callable(judge) else judge
    with placed(out, "comparison") as target:
        inputs = Inputs(target)
        comparison = compare_policies(
            [inputs.model(policy) for policy in policies],
            [inputs.judge(one) for one in judges],
            PromptSelection(inputs.data(data), split, limit, seed),
            SamplingParams(max_new_tokens, temperature, samples_per_prompt),
            _judge_options(dtype, template),
            out=target,
            reporter=reporter or Reporter(quiet=True),
        )
        # Not those of earlier calls, which lie there too.
        files = dict.fromkeys(comparison["sample_files"].values())
        samples = [row for file in files for row in read_table(target / file)]
        values = inputs.named({**comparison, "samples": samples})
        return _judged(values)


@quietly
def judge(
    outputs: Mapping[str, Data] | Sequence[str | Path] | str | Path,
    judge: Judge,
    *,
    policy: str | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    template: str | None = None,
    with_text: bool = False,
    annotations: str | Path | None = None,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel judge``: judge existing outputs of two or more systems, and compute win rates.

    Args:
        outputs: the outputs by the name of their system (rows of ``prompt`` and ``response``), or files as on the
            command line: AlpacaEval's ``model_outputs.json``, a run folder, rows of prompt and response.
        judge: a function f(prompts, completions) of numbers, or a judge as on the command line.
        policy: the one system that is compared; the default is each.
        baseline: the system that the others are compared with; the default compares each with each.
        limit: use only so many prompts.
        seed: of the resamples.
        template: what a language model is asked: choice, score, logprob, or a YAML file.
        with_text: add the texts to the table.
        annotations: also write AlpacaEval's ``annotations.json`` to this file.
        dtype: precision of the forward passes.
        out: a Parquet file of judgements to write; without it no file remains.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel judge --json`` prints, with ``win_rates``, and the judgements under ``judgements``.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.files import read_table
    from toolkit.measure.judge import JudgedFiles, judge_outputs

    with placed(out, "judgements.parquet") as target:
        inputs = Inputs(target)
        report = judge_outputs(
            JudgedFiles(inputs.outputs(outputs), policy, baseline, limit),
            inputs.judge(judge),
            _judge_options(dtype, template),
            seed=seed,
            out=target,
            reporter=reporter or Reporter(quiet=True),
            annotations=None if annotations is None else Path(annotations),
            with_text=with_text,
            force=force,
        )
        values = inputs.named({**report, "judgements": read_table(target)})
        return _judged(values)


@quietly
def winrate(
    judgements: Data | Sequence[str | Path],
    *,
    length_control: bool = False,
    lc_table: str | Path | None = None,
    style_control: bool = False,
    by: str | None = None,
    attributes: str | Path | None = None,
    pool_judges: bool = False,
    ranking: bool = False,
    reference: str | None = None,
    human: Data | None = None,
    columns: Mapping[str, str] | None = None,
    bootstrap: int | None = None,
    confidence: float | None = None,
    seed: int | None = None,
) -> Result:
    """``duel winrate``: win rates of recorded judgements.

    Args:
        judgements: rows of pairs with a winner (``prompt, model_a, model_b, winner`` and the usual names), or one or
            several files as on the command line.
        length_control: add the length-controlled win rate.
        lc_table: the folder with AlpacaEval's table, for its length-controlled win rate.
        style_control: add the win rate at equal style.
        by: add a row for each value of this column.
        attributes: a file of prompts with that column.
        pool_judges: add all judges together.
        ranking: add Bradley-Terry strengths.
        reference: measure the other judges against this one.
        human: people's votes on some of the prompts, which correct the judges.
        columns: prompt, model_a, model_b, response_a, response_b, winner or judge to their names in the data.
        bootstrap: resamples for each interval; None is as the files record, else 2000.
        confidence: coverage of each interval; None is as the files record, else 0.95.
        seed: of the resamples; None is as the files record, else 0.

    Returns what ``duel winrate --json`` prints, with ``win_rates``.

    Raises:
        DataError: rows that are no judgements.
    """
    from toolkit.evals.length_control import load_length_table
    from toolkit.judging.controls import IntervalOptions
    from toolkit.judging.win_rates import Controls, winrate_report

    table = load_length_table(lc_table) if lc_table is not None else None
    controls = Controls(length=length_control or table is not None, style=style_control, table=table)
    intervals: IntervalOptions = {}
    if bootstrap is not None:
        intervals["n_resamples"] = bootstrap
    if confidence is not None:
        intervals["confidence"] = confidence
    if seed is not None:
        intervals["seed"] = seed
    with placed(None, "judgements") as target:
        inputs = Inputs(target)
        report = winrate_report(
            _files(judgements, inputs),
            controls=controls,
            by=by,
            attributes=attributes,
            pool_judges=pool_judges,
            ranking=ranking,
            reference=reference,
            human=None if human is None else inputs.data(human, "votes"),
            columns=columns,
            **intervals,
        )
    values = inputs.named(report)
    return _judged(values)


@quietly
def label(
    data: Data,
    judge: Judge,
    *,
    out: str | Path,
    policy: Model | None = None,
    principles: str | Sequence[str] | None = None,
    draw: Literal["one", "all"] = "one",
    labels: Literal["soft", "hard"] = "soft",
    k: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
    template: str | None = None,
    dtype: Dtype = "float32",
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel label``: preference data from responses and a judge.

    Args:
        data: the responses to label, or with ``policy`` the prompts.
        judge: a function f(prompts, completions) of numbers, a judge that scores, or a language model.
        out: the file to write (.jsonl.gz), which ``data.source`` reads.
        policy: samples the responses.
        principles: what a language model compares by: ``hhh``, a file, or a list of texts.
        draw: one principle at random for each comparison, or all, which vote.
        labels: soft are probabilities, hard are winners.
        k: responses to sample for a prompt.
        temperature: of sampling.
        max_new_tokens: the longest sample in tokens.
        limit: use only so many prompts.
        split: of a data set on the hub.
        seed: of everything that is random.
        template: what a language model is asked.
        dtype: precision of the forward passes.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel label --json`` prints.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.judging.principles import Labelling, load_principles
    from toolkit.measure.label import label_data
    from toolkit.measure.options import PromptSelection

    one_of("draw", draw, ("one", "all"))
    one_of("labels", labels, ("soft", "hard"))
    inputs = Inputs(Path(out))
    options = _judge_options(dtype, template)
    texts = load_principles(principles) if isinstance(principles, str) else list(principles or [])
    labelling = Labelling(inputs.judge(judge), texts, options, draw, labels, seed)
    sampler = None
    if policy is not None:
        sampler = _sampler(inputs.model(policy), options.model, (max_new_tokens, temperature, k))
    summary = label_data(
        labelling,
        PromptSelection(inputs.data(data), split, limit, seed),
        sampler=sampler,
        out=Path(out),
        force=force,
        reporter=reporter or Reporter(quiet=True),
    )
    return Result(inputs.named(summary), [])


@quietly
def simulate(
    data: Data,
    *,
    out: str | Path,
    policy: Model | None = None,
    annotators: str | Path | Sequence[Annotator] | None = None,
    k: int = 6,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
    dtype: Dtype = "float32",
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel simulate``: preference data from responses, a known gold reward and biased, noisy annotators.

    Args:
        data: prompts; with responses of its own, these are taken where no ``policy`` is named.
        out: the file to write (.jsonl.gz or .parquet), which ``data.source`` reads.
        policy: samples the responses.
        annotators: a YAML or JSON file, or a list of :class:`toolkit.preferences.simulate.Annotator`; the default is
            three of them.
        k: responses to sample for a prompt.
        temperature: of sampling.
        max_new_tokens: the longest sample in tokens.
        limit: use only so many prompts.
        split: of a data set on the hub.
        seed: of everything that is random.
        dtype: precision of the forward passes.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel simulate --json`` prints.

    Raises:
        DataError: no prompt has two different responses.
    """
    from toolkit.measure.annotators import read_annotators
    from toolkit.measure.options import PromptSelection
    from toolkit.measure.simulate import policy_to_sample, simulate_data
    from toolkit.preferences.simulate import ANNOTATORS

    inputs = Inputs(Path(out))
    people = read_annotators(Path(annotators)) if isinstance(annotators, str | Path) else annotators or ANNOTATORS
    selection = PromptSelection(inputs.data(data), split, limit, seed)
    sampler = None
    model = _judge_options(dtype, None).model
    named = policy_to_sample(None if policy is None else inputs.model(policy), selection, prefer_own=True)
    if named is not None:
        sampler = _sampler(named, model, (max_new_tokens, temperature, k))
    quiet = reporter or Reporter(quiet=True)
    summary = simulate_data(sampler, selection, list(people), out=Path(out), force=force, reporter=quiet)
    return Result(inputs.named(summary), [])


def _judged(report: dict[str, Any]) -> Result:
    """Win rates as the command shows them."""
    return Result(report, judging_sheets(report), "\n".join(judging_notes(report)), main="win_rates")


def _sampler(policy: str, model: ModelSection, params: tuple[int, float, int]) -> PolicySampler:
    """``params``: the longest response, the temperature, and how many responses to a prompt."""
    from toolkit.engine.sampling import SamplingParams
    from toolkit.measure.sampling import PolicySampler

    return PolicySampler(policy, model, SamplingParams(*params))


def _judge_options(dtype: str, template: str | None) -> JudgeOptions:
    from toolkit.judging.options import JudgeOptions
    from toolkit.recipe.schema import JudgeSettings
    from toolkit.recipe.training import ModelSection

    one_of("dtype", dtype, DTYPES)
    return JudgeOptions(ModelSection(dtype=dtype), JudgeSettings(template=template))


def _files(judgements: Any, inputs: Inputs) -> list[str | Path]:
    """Files unchanged, one or several; records are written to one."""
    if isinstance(judgements, str | Path):
        return [judgements]
    if isinstance(judgements, Sequence) and judgements and all(isinstance(file, str | Path) for file in judgements):
        return list(judgements)
    return [inputs.data(judgements)]
