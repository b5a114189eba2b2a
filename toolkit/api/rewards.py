"""Rewards, reward models and preference data from Python: measured, filtered and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from toolkit.api.inputs import DTYPES, Data, Dtype, Inputs, Judge, Model, one_of, placed, quietly
from toolkit.api.results import Result
from toolkit.progress import Reporter
from toolkit.report.sheets import filter_sheet, rewards_sheets

if TYPE_CHECKING:
    from toolkit.measure.check.check import CheckResult


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
        data: preference data, rows of prompt and response, or a run's samples.
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

    one_of("dtype", dtype, DTYPES)
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

    one_of("dtype", dtype, DTYPES)
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
    one_of("dtype", dtype, DTYPES)
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

    one_of("dtype", dtype, DTYPES)
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
def check(
    data: Data,
    model: Model,
    *,
    held_out: Data | None = None,
    held_out_split: str | None = None,
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
        held_out_split: of ``held_out``, where that is a data set on the hub; None takes ``split``.
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
            held_out_split=held_out_split,
            likelihood=likelihood,
            seed=seed,
            chat_template=str(chat_template) if chat_template is not None else None,
        )
        return check_data(inputs.data(data), inputs.model(model), options)


def _is_function(model: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a reward is a function: a model in memory can be called, too, and has weights."""
    from torch.nn import Module

    return callable(model) and not isinstance(model, Module)


def _name(out: str | Path | None) -> str | None:
    return str(out) if out is not None else None
