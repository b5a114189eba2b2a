"""Measurements from Python: rewards of data, samples and judgements of policies, preference data that a judge makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

from toolkit.api.inputs import Data, Inputs, Judge, Model, one_of, placed, quietly
from toolkit.api.results import Result
from toolkit.progress import Reporter
from toolkit.report.sheets import filter_sheet, rewards_sheets, win_rate_sheet

if TYPE_CHECKING:
    from toolkit.judging.options import JudgeOptions
    from toolkit.measure.check.check import CheckResult
    from toolkit.preferences.simulate import Annotator

Dtype = Literal["float32", "bfloat16"]


@quietly
def implicit_rewards(
    policy: Model,
    reference: Model,
    data: Data,
    *,
    beta: float | None = None,
    rm: Model | None = None,
    samples: str | Path | None = None,
    shifts: Sequence[str] = (),
    per_token: bool = False,
    with_ids: bool = False,
    with_text: bool = False,
    any_reference: bool = False,
    limit: int | None = None,
    split: str = "train",
    plain: bool = False,
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel rewards``: the implicit reward beta * log(pi/pi_ref) of every response.

    Args:
        policy: the trained policy.
        reference: the policy that training started from, or "none".
        data: preference data.
        beta: the scale; None takes what the policy was trained with, or 0.1.
        rm: an explicit reward model to check the rewards against.
        samples: a run's ``samples.parquet``: with ``rm``, what its policies wrote is checked, too.
        shifts: shifted comparisons, NAME:FILE or built in (case, whitespace, list, courtesy, truncated, swapped).
        per_token: add the reward of each token.
        with_ids: add the token ids.
        with_text: add the texts.
        any_reference: accept another reference than the policy was trained against.
        limit: use only so many prompts.
        split: of a data set on the hub.
        plain: read transcripts as text.
        max_prompt_tokens: leave out longer prompts.
        max_response_tokens: cut longer responses.
        batch_tokens: tokens to score at once; None is the device's default.
        dtype: precision of the forward passes.
        out: a Parquet file to write; without it no file remains.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns the summary, with one dict for each response under ``rows``.

    Raises:
        ModelError: a reference that is not the one that the policy was trained against.
    """
    from toolkit.files import read_table
    from toolkit.measure import rewards
    from toolkit.measure.options import ScoringOptions
    from toolkit.measure.reading import ReadingOptions

    one_of("dtype", dtype, ("float32", "bfloat16"))
    with placed(out, "rewards.parquet") as target:
        inputs = Inputs(target)
        explicit = inputs.model(rm) if rm is not None else None
        options = rewards.RewardOptions(
            beta, explicit, samples, shifts, per_token, with_ids, any_reference, with_text=with_text
        )
        summary = rewards.implicit_rewards(
            inputs.model(policy),
            inputs.model(reference),
            inputs.data(data),
            options,
            ReadingOptions(split, limit, plain, max_prompt_tokens, max_response_tokens),
            ScoringOptions(dtype, batch_tokens),
            out=target,
            force=force,
            reporter=reporter or Reporter(quiet=True),
        )
        if not summary:  # under `accelerate launch` only the main process has results
            return Result({}, [])
        values = {**summary, "out": _name(out), "rows": read_table(target)}
        return Result(inputs.named(values), rewards_sheets(summary), main="rows")


@quietly
def score(
    rm: Model,
    data: Data,
    *,
    with_text: bool = False,
    limit: int | None = None,
    split: str = "train",
    plain: bool = False,
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel score``: the explicit reward of every response.

    Args:
        rm: the reward model.
        data: preference data, rows of prompt and response, or a run's samples.
        with_text: add the texts.
        limit: use only so many prompts.
        split: of a data set on the hub.
        plain: read transcripts as text.
        max_prompt_tokens: leave out longer prompts.
        max_response_tokens: cut longer responses.
        batch_tokens: tokens to score at once; None is the device's default.
        dtype: precision of the forward passes.
        out: a Parquet file to write; without it no file remains.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns the summary, with one dict for each response under ``rows``.

    Raises:
        ModelError: a model that is no reward model.
    """
    from toolkit.files import read_table
    from toolkit.measure.explicit import explicit_rewards
    from toolkit.measure.options import ScoringOptions
    from toolkit.measure.reading import ReadingOptions

    one_of("dtype", dtype, ("float32", "bfloat16"))
    with placed(out, "rewards.parquet") as target:
        inputs = Inputs(target)
        summary = explicit_rewards(
            inputs.model(rm),
            inputs.data(data),
            ReadingOptions(split, limit, plain, max_prompt_tokens, max_response_tokens),
            ScoringOptions(dtype, batch_tokens),
            with_text=with_text,
            out=target,
            force=force,
            reporter=reporter or Reporter(quiet=True),
        )
        values = {**summary, "out": _name(out), "rows": read_table(target)}
        return Result(inputs.named(values), rewards_sheets(summary, "Explicit rewards"), main="rows")


@quietly
def rm_card(
    model: Model | Judge,
    data: Data | None = None,
    *,
    steps: Data | None = None,
    implicit: str | tuple[Model, Model] | None = None,
    beta: float | None = None,
    any_reference: bool = False,
    by: str | None = None,
    judge: Judge | None = None,
    best_of: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    split: str = "train",
    plain: bool = False,
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel rm-card``: how good a reward model is, and how it is biased.

    Args:
        model: a reward model, ``gold``, or a function f(prompts, completions) of numbers (also
            ``python:MODULE:FUNCTION``).
        data: preference data.
        steps: in its place, labelled steps of solutions, for a process reward model.
        implicit: (policy, reference), whose implicit reward stands beside; also the text POLICY,REFERENCE.
        beta: the scale of the implicit reward, as in :func:`implicit_rewards`.
        any_reference: accept another reference than the policy was trained against.
        by: the column that says where a row is from.
        judge: measure the best of n by this judge, too.
        best_of: the largest n; every prompt then needs as many responses.
        seed: of the resamples.
        limit: use only so many prompts.
        split: of a data set on the hub.
        plain: read transcripts as text.
        max_prompt_tokens: leave out longer prompts.
        max_response_tokens: cut longer responses.
        batch_tokens: tokens to score at once; None is the device's default.
        dtype: precision of the forward passes.
        out: a folder for the card and the scores; without it no file remains.
        force: overwrite existing files.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel rm-card --json`` prints.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.errors import RecipeError
    from toolkit.measure.options import ScoringOptions
    from toolkit.measure.reading import ReadingOptions
    from toolkit.measure.rm_card import CardOptions
    from toolkit.measure.rm_card import rm_card as make_card
    from toolkit.measure.step_card import step_card
    from toolkit.report.card_sheets import card_sheets, flag_lines
    from toolkit.report.process import process_sheets

    if (data is None) == (steps is None):
        raise RecipeError(
            "a card is made of preference data or of labelled steps", where="data", fix="give one of them"
        )
    one_of("dtype", dtype, ("float32", "bfloat16"))
    with placed(None, "card") as beside:
        inputs = Inputs(beside if out is None else Path(out))
        pair = ",".join(map(inputs.model, implicit)) if isinstance(implicit, tuple) else implicit
        asked = CardOptions(pair, beta, any_reference, by, inputs.judge(judge) if judge else None, best_of, seed)
        reading = ReadingOptions(split, limit, plain, max_prompt_tokens, max_response_tokens)
        scoring = ScoringOptions(dtype, batch_tokens)
        name = inputs.judge(model) if _is_function(model) else inputs.model(cast("Model", model))
        writing: dict[str, Any] = {"out": None if out is None else Path(out), "force": force}
        writing["reporter"] = reporter or Reporter(quiet=True)
        scratch = Inputs(beside, inputs.names)  # the records are the caller's own, and are not left behind
        if steps is not None:
            card = step_card(name, scratch.data(steps, "steps"), asked, reading, scoring, **writing)
            return Result(inputs.named(card), process_sheets(card, card["intervals"]["confidence"]))
        assert data is not None  # one of the two was named
        card = make_card(name, scratch.data(data), asked, reading, scoring, **writing)
        return Result(inputs.named(card), card_sheets(card), "\n".join(flag_lines(card)))


@quietly
def filter_rows(
    data: Data,
    judge: Judge,
    *,
    calibrate: Data,
    fpr: float,
    out: str | Path,
    columns: Mapping[str, str] | None = None,
    plain: bool = False,
    split: str = "train",
    batch_tokens: int | None = None,
    dtype: Dtype = "float32",
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel filter``: write the rows whose response scores above a threshold to ``out``, the others beside it.

    Args:
        data: the rows to filter.
        judge: scores the responses: a function f(prompts, completions), ``rm:MODEL``,
            ``implicit:POLICY,REFERENCE``, ``python:MODULE:FUNCTION`` or ``gold``.
        calibrate: labelled data, from which the threshold comes.
        fpr: the share of bad responses that may be kept, as a fraction of one.
        out: the file of the kept rows.
        columns: prompt, response and label to their names in the data.
        plain: read transcripts as text.
        split: of a data set on the hub.
        batch_tokens: tokens to score at once; None is the device's default.
        dtype: precision of the forward passes.
        force: overwrite an existing file.
        reporter: shows the progress; by default nothing does.

    Returns what ``duel filter --json`` prints.

    Raises:
        DataError: calibration data of one class, or with too few bad responses for ``fpr``.
    """
    from toolkit.measure import filter as filtering
    from toolkit.measure.options import ScoringOptions

    one_of("dtype", dtype, ("float32", "bfloat16"))
    inputs = Inputs(Path(out))
    summary = filtering.filter_rows(
        inputs.judge(judge),
        inputs.data(data),
        filtering.FilterOptions(inputs.data(calibrate, "labels"), fpr, columns or {}, plain, split),
        ScoringOptions(dtype, batch_tokens),
        out=Path(out),
        force=force,
        reporter=reporter or Reporter(quiet=True),
    )
    return Result(inputs.named(summary), [filter_sheet(summary)])


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
        samples = [row for path in sorted(target.glob("samples-*.parquet")) for row in read_table(path)]
        values = inputs.named({**comparison, "samples": samples})
        return Result(values, [win_rate_sheet(values["win_rates"])], main="win_rates")


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
        return Result(values, [win_rate_sheet(values["win_rates"])], main="win_rates")


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
    return Result(values, [win_rate_sheet(values["win_rates"])], main="win_rates")


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
    from toolkit.engine.sampling import SamplingParams
    from toolkit.judging.principles import Labelling, load_principles
    from toolkit.measure.label import label_data
    from toolkit.measure.options import PromptSelection
    from toolkit.measure.sampling import PolicySampler

    one_of("draw", draw, ("one", "all"))
    one_of("labels", labels, ("soft", "hard"))
    inputs = Inputs(Path(out))
    options = _judge_options(dtype, template)
    texts = load_principles(principles) if isinstance(principles, str) else list(principles or [])
    labelling = Labelling(inputs.judge(judge), texts, options, draw, labels, seed)
    params = SamplingParams(max_new_tokens, temperature, k)
    sampler = PolicySampler(inputs.model(policy), options.model, params) if policy is not None else None
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
    from toolkit.engine.sampling import SamplingParams
    from toolkit.measure.annotators import read_annotators
    from toolkit.measure.options import PromptSelection
    from toolkit.measure.responses import has_responses
    from toolkit.measure.sampling import PolicySampler
    from toolkit.measure.simulate import simulate_data
    from toolkit.preferences.simulate import ANNOTATORS

    inputs = Inputs(Path(out))
    people = read_annotators(Path(annotators)) if isinstance(annotators, str | Path) else annotators or ANNOTATORS
    selection = PromptSelection(inputs.data(data), split, limit, seed)
    sampler = None
    if policy is not None or not has_responses(selection):
        params = SamplingParams(max_new_tokens, temperature, k)
        sampler = PolicySampler(inputs.model(policy or "smollm2-135m"), _judge_options(dtype, None).model, params)
    quiet = reporter or Reporter(quiet=True)
    summary = simulate_data(sampler, selection, list(people), out=Path(out), force=force, reporter=quiet)
    return Result(inputs.named(summary), [])


@quietly
def check(
    data: Data,
    model: Model,
    *,
    held_out: Data | None = None,
    max_prompt_tokens: int = 512,
    max_response_tokens: int = 256,
    columns: Mapping[str, str] | None = None,
    conversational: bool | None = None,
    annotators: Sequence[str] | None = None,
    config: str | None = None,
    chat_template: str | Path | None = None,
    limit: int | None = None,
    likelihood: int = 0,
    seed: int = 0,
    split: str = "train",
) -> CheckResult:
    """``duel check``: what is valid but wrong in preference data, for the tokenizer and chat template of a model.

    Args:
        data: preference data, as of :func:`run`.
        model: the model that will be trained on it.
        held_out: data whose prompts must not be among those of ``data``.
        max_prompt_tokens: the limit in tokens, as ``data`` of a recipe has it.
        max_response_tokens: the same of responses.
        columns: the name of a format's column -> the name of that column in the data.
        conversational: True reads transcripts and text prompts as chat messages, False leaves them as text.
        annotators: use the comparisons of these annotators only.
        config: configuration of a data set on the hub.
        chat_template: a Jinja file that replaces the model's chat template.
        limit: check only the first rows.
        likelihood: how many rows, drawn with ``seed``, the model scores (``off_policy``). 0 needs no forward pass.
        seed: of that draw.
        split: of a data set on the hub.

    Returns a frozen :class:`toolkit.measure.check.check.CheckResult`: ``n_rows``, ``n_refused`` (rows for which a run
    refuses the whole data) and ``findings``, each with ``kind``, ``n_rows``, ``rows`` (the first ten, from 1),
    ``example`` and ``fix``.

    Raises:
        DataError: a source that cannot be read, or has no row that can.
        ModelError: no such model, or one without a chat template for conversations.
    """
    from toolkit.measure.check.check import CheckOptions, check_data
    from toolkit.measure.check.rows import SourceOptions
    from toolkit.measure.check.tokens import Limits

    source = SourceOptions(
        split=split, config=config, columns=columns or {}, conversational=conversational, annotators=annotators
    )
    with placed(None, "check") as target:
        inputs = Inputs(target)
        options = CheckOptions(
            source,
            Limits(max_prompt_tokens, max_response_tokens),
            limit=limit,
            held_out=None if held_out is None else inputs.data(held_out, "held_out"),
            likelihood=likelihood,
            seed=seed,
            chat_template=str(chat_template) if chat_template is not None else None,
        )
        return check_data(inputs.data(data), inputs.model(model), options)


def _judge_options(dtype: str, template: str | None) -> JudgeOptions:
    from toolkit.judging.options import JudgeOptions
    from toolkit.recipe.schema import JudgeSettings, ModelSection

    one_of("dtype", dtype, ("float32", "bfloat16"))
    return JudgeOptions(ModelSection(dtype=dtype), JudgeSettings(template=template))


def _files(judgements: Any, inputs: Inputs) -> list[str | Path]:
    """Files unchanged, one or several; records are written to one."""
    if isinstance(judgements, str | Path):
        return [judgements]
    if isinstance(judgements, Sequence) and judgements and all(isinstance(file, str | Path) for file in judgements):
        return list(judgements)
    return [inputs.data(judgements)]


def _is_function(model: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a reward is a function: a model in memory can be called, too, and has weights."""
    from torch.nn import Module

    return callable(model) and not isinstance(model, Module)


def _name(out: str | Path | None) -> str | None:
    return str(out) if out is not None else None
