"""duel from Python: ``run, study, check, implicit_rewards, rm_card, compare`` of ``toolkit``. Results are tables."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.progress import Reporter
from toolkit.report.sheets import Sheet, filter_sheet, html_of, result_sheets, rewards_sheets, text_of, win_rate_sheet
from toolkit.report.study_sheets import study_sheets

if TYPE_CHECKING:
    from toolkit.measure.check.check import CheckResult

Data = str | Path | Iterable[Mapping[str, Any]]
"""A data source as on the command line, or records (dicts, a ``datasets.Dataset``) in any format that it reads."""


class Result(dict[str, Any]):
    """A mapping of numbers that is shown as tables: as HTML in a notebook, as text where it is printed."""

    def __init__(self, values: Mapping[str, Any], sheets: Sequence[Sheet], sentence: str = "") -> None:
        super().__init__(values)
        self.sheets, self.sentence = list(sheets), sentence

    def _repr_html_(self) -> str:
        return html_of(*self.sheets, sentence=self.sentence)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [text_of(*self.sheets), self.sentence]))


def run(
    recipe: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    until: str | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel run``: the paired run of a recipe (a file, or a shipped name), or the rest of an interrupted one.

    ``settings`` maps dotted names to values, such as ``{"dpo.beta": 0.3}``. ``data`` replaces ``data.source``; records
    are written to ``out/records.jsonl``. Returns ``results.json`` with ``out`` (the run folder) and ``status`` added.
    With ``until`` a stage before the evaluation it returns only these two.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.files import read_json
    from toolkit.recipe.files import load_recipe
    from toolkit.runs import pipeline

    sets, folder = _sets_and_folder(recipe, settings, data, out)
    loaded = load_recipe(str(recipe), sets)
    command = ["python", "-c", f"from toolkit import run; run({str(recipe)!r}, settings={dict(settings or {})!r})"]
    options = pipeline.RunOptions(until=until, force=force, command=command)
    manifest = pipeline.run(loaded, folder, reporter or Reporter(), options)
    facts = {"out": str(folder), "status": manifest["status"]}
    if "evaluate" not in manifest["stages"]:
        return Result(facts, [])
    results = read_json(folder / "results.json")
    return Result({**results, **facts}, result_sheets(results), results["verdict"]["sentence"])


def study(
    recipe: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    engine: str = "local",
    reporter: Reporter | None = None,
) -> Result:
    """``duel study``: both arms with equal tuning and an equal budget over seeds, or the rest of a study that began.

    ``settings``, ``data`` and ``out`` are as in :func:`run`; ``{"study.seeds": 5}`` sets the number of seeds.
    ``engine`` is local, or ray. Returns ``study.json`` with ``out`` (the study's folder) added.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.runs.study.run import run_study
    from toolkit.runs.study.trials import StudyPlan

    sets, folder = _sets_and_folder(recipe, settings, data, out)
    command = ["python", "-c", f"from toolkit import study; study({str(recipe)!r}, settings={dict(settings or {})!r})"]
    plan = StudyPlan(str(recipe), tuple(sets), folder)
    document = run_study(plan, reporter or Reporter(), engine=engine, command=command)
    return Result({**document, "out": str(folder)}, study_sheets(document), document["verdict"]["sentence"])


def _sets_and_folder(
    recipe: str | Path, settings: Mapping[str, Any] | None, data: Data | None, out: str | Path | None
) -> tuple[list[str], Path]:
    """The settings as the command line has them, and the folder of a run or study. Records are written to it."""
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.yaml_values import one_line

    sets = [f"{name}={one_line(value)}" for name, value in (settings or {}).items()]
    folder = Path(out) if out is not None else Path("runs") / load_recipe(str(recipe), sets).recipe.name
    if data is not None:
        sets.append(f"data.source={one_line(_data_source(data, folder / 'records.jsonl'))}")
    return sets, folder


def implicit_rewards(
    policy: str,
    reference: str,
    data: Data,
    *,
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Result:
    """``duel rewards``: the implicit reward beta * log(pi/pi_ref) of every response.

    ``options`` are those of the command, such as ``beta``, ``rm``, ``per_token`` and ``limit``. Returns the summary,
    with one dict for each response under ``rows``. Without ``out`` no file remains.

    Raises:
        ModelError: a reference that is not the one that the policy was trained against.
    """
    from toolkit.files import read_table
    from toolkit.measure import rewards
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions

    reading, scoring = take(ReadingOptions, options), take(ScoringOptions, options)
    reward_options = rewards.RewardOptions(**options)

    def score(target: Path) -> Result:
        summary = rewards.implicit_rewards(
            policy,
            reference,
            _data_source(data, _records_of(target)),
            reward_options,
            reading,
            scoring,
            out=target,
            force=force,
            reporter=reporter or Reporter(quiet=True),
        )
        if not summary:  # under `accelerate launch` only the main process has results
            return Result({}, [])
        rows = read_table(target)
        if not isinstance(data, str | Path):  # the file that records were written to is not the user's
            rows = [{**row, "source_file": "records"} for row in rows]
        return Result({**summary, "out": str(out) if out is not None else None, "rows": rows}, rewards_sheets(summary))

    return _in_folder(out, "rewards.parquet", score)


def rm_card(
    model: str,
    data: Data,
    *,
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Result:
    """``duel rm-card``: how good a reward model is, and how it is biased.

    ``model`` is a reward model, ``gold`` or ``python:MODULE:FUNCTION``. ``options`` are those of the command, such as
    ``implicit``, ``by`` and ``limit``. Returns what ``duel rm-card --json`` prints. Without ``out`` no file remains.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.measure.options import ScoringOptions, take
    from toolkit.measure.reading import ReadingOptions
    from toolkit.measure.rm_card import CardOptions
    from toolkit.measure.rm_card import rm_card as make_card
    from toolkit.report.card_sheets import card_sheets, flag_lines

    reading, scoring = take(ReadingOptions, options), take(ScoringOptions, options)
    asked = CardOptions(**options)
    with tempfile.TemporaryDirectory() as folder:
        source = _data_source(data, Path(folder) / "records.jsonl")
        folder_of_card = Path(out) if out is not None else None
        quiet = reporter or Reporter(quiet=True)
        card = make_card(model, source, asked, reading, scoring, out=folder_of_card, force=force, reporter=quiet)
    return Result(card, card_sheets(card), "\n".join(flag_lines(card)))


def filter_rows(
    data: Data,
    judge: str,
    *,
    calibrate: Data,
    fpr: float,
    out: str | Path,
    columns: Mapping[str, str] | None = None,
    plain: bool = False,
    split: str = "train",
    dtype: Literal["float32", "bfloat16"] = "float32",
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel filter``: write the rows whose response scores above a threshold to ``out``, the others beside it.

    ``judge`` scores responses (``rm:MODEL``, ``implicit:POLICY,REFERENCE``, ``python:MODULE:FUNCTION``, ``gold``).
    ``calibrate`` is labelled data, from which the threshold for the false-positive rate ``fpr`` comes. ``columns`` maps
    prompt, response and label to their names in the data. Returns what ``duel filter --json`` prints.

    Raises:
        DataError: calibration data of one class, or with too few bad responses for ``fpr``.
    """
    from toolkit.measure import filter as filtering
    from toolkit.measure.options import ScoringOptions

    target = Path(out)
    summary = filtering.filter_rows(
        judge,
        _data_source(data, _records_of(target)),
        filtering.FilterOptions(
            _data_source(calibrate, target.with_name(f"{target.name}.labels.jsonl")), fpr, columns or {}, plain, split
        ),
        ScoringOptions(dtype),
        out=target,
        force=force,
        reporter=reporter or Reporter(quiet=True),
    )
    return Result(summary, [filter_sheet(summary)])


def compare(
    *policies: str,
    data: Data,
    judge: str | Sequence[str],
    out: str | Path | None = None,
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
    dtype: str = "float32",
    reporter: Reporter | None = None,
) -> Result:
    """``duel compare``: sample two or more policies on the same prompts, judge the samples, and compute win rates.

    Returns what ``duel compare --json`` prints, with ``win_rates``, and the samples under ``samples``. Without ``out``
    no file remains.
    """
    from toolkit.engine.sampling import SamplingParams
    from toolkit.files import read_table
    from toolkit.judging.options import JudgeOptions
    from toolkit.measure.compare import compare_policies
    from toolkit.measure.options import PromptSelection
    from toolkit.recipe.schema import ModelSection

    def sample_and_judge(target: Path) -> Result:
        comparison = compare_policies(
            policies,
            [judge] if isinstance(judge, str) else judge,
            PromptSelection(_data_source(data, _records_of(target)), split, limit, seed),
            SamplingParams(max_new_tokens, temperature, samples_per_prompt),
            JudgeOptions(ModelSection(dtype=dtype)),
            out=target,
            reporter=reporter or Reporter(quiet=True),
        )
        samples = [row for path in sorted(target.glob("samples-*.parquet")) for row in read_table(path)]
        return Result({**comparison, "samples": samples}, [win_rate_sheet(comparison["win_rates"])])

    return _in_folder(out, "comparison", sample_and_judge)


def check(
    data: Data,
    model: str,
    *,
    held_out: Data | None = None,
    max_prompt_tokens: int = 512,
    max_response_tokens: int = 256,
    columns: Mapping[str, str] | None = None,
    conversational: bool | None = None,
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
        max_prompt_tokens, max_response_tokens: the limits in tokens, as ``data`` of a recipe has them.
        columns: the name of a format's column -> the name of that column in the data.
        conversational: True reads transcripts and text prompts as chat messages, False leaves them as text.
        limit: check only the first rows.
        likelihood: how many rows, drawn with ``seed``, the model scores (``off_policy``). 0 needs no forward pass.
        split: of a data set on the hub.

    Returns a frozen :class:`toolkit.measure.check.check.CheckResult`: ``n_rows`` and ``findings``, each with ``kind``,
    ``n_rows``, ``rows`` (the first ten, from 1), ``example`` and ``fix``.

    Raises:
        DataError: a source that cannot be read, or has no row that can.
        ModelError: no such model, or one without a chat template for conversations.
    """
    from toolkit.measure.check.check import CheckOptions, check_data
    from toolkit.measure.check.rows import SourceOptions
    from toolkit.measure.check.tokens import Limits

    source = SourceOptions(split=split, columns=columns or {}, conversational=conversational)
    with tempfile.TemporaryDirectory() as folder:
        options = CheckOptions(
            source,
            Limits(max_prompt_tokens, max_response_tokens),
            limit=limit,
            held_out=None if held_out is None else _data_source(held_out, Path(folder) / "held_out.jsonl"),
            likelihood=likelihood,
            seed=seed,
        )
        return check_data(_data_source(data, Path(folder) / "records.jsonl"), model, options)


def _in_folder(out: str | Path | None, name: str, work: Callable[[Path], Result]) -> Result:
    """The result of ``work(target)``. Where the user named no target it lies in a folder that is removed afterwards."""
    if out is not None:
        return work(Path(out))
    with tempfile.TemporaryDirectory() as folder:
        return work(Path(folder) / name)


def _records_of(target: Path) -> Path:
    """The file for the user's records: beside the target, with its name."""
    return target.with_name(f"{target.name}.records.jsonl")


def _data_source(data: Data, path: Path) -> str:
    """A name or file unchanged. Records are written to the file ``path``, with the same bytes for the same records."""
    if isinstance(data, str | Path):
        return str(data)
    from toolkit.files import write_text

    write_text(path, "".join(json.dumps(dict(record), ensure_ascii=False) + "\n" for record in data))
    return str(path)
