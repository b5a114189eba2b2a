"""``duel rm-card``: how good a reward model is, explicit or implicit, on labelled responses, and no PPO is needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import DataError, RecipeError, StoreError, nearest
from toolkit.evals.agreement import LOG_Z_WARNING, Comparison
from toolkit.evals.best_of_pool import check_pools
from toolkit.evals.feature_bias import LEAST_COEFFICIENT, LEAST_OVERSTATED, MOST
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.evals.reward_card import CardData, StyledResponses, all_pairs, card_flags, margin_scale, reward_card
from toolkit.evals.style_matrix import STYLES
from toolkit.files import file_hash, fingerprint, folder_fingerprint, read_json, write_json, write_table
from toolkit.judging.independence import judging_models, seen_in_training
from toolkit.judging.scorers import judge_identity
from toolkit.measure.card_scores import (
    CardRewards,
    CardRows,
    Scored,
    card_rewards,
    card_rows,
    check_scores,
    is_function,
    judge_scores,
    scorer_identity,
)
from toolkit.measure.opinion_probe import opinion_section, shipped_gold
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.measure.rewards import RewardOptions
from toolkit.preferences import splits
from toolkit.preferences.loading import SourceRecords, load, local_path
from toolkit.preferences.rows import PreferenceRow, Record, prompt_id
from toolkit.preferences.simulate import feature
from toolkit.progress import Reporter
from toolkit.runs.kinds import CARD_FILE, refuse_others_folder
from toolkit.runs.store import RunFolder

SCORES_FILE = "scores.parquet"
# The columns that say where a row is from; the first that the data has counts.
SOURCE_COLUMNS = ("source", "subset", "domain", "dataset", "category")
MOST_SOURCES = 50  # a column with more values is an identifier, and its values are no sources
ALARM = (
    f"A flag is a coefficient of a feature, of at least {LEAST_COEFFICIENT:g}, that lies beyond what the reference "
    "(gold, else the labels) explains: beyond both r * g, as noise would weaken it, and g / r, as a small model would "
    "strengthen it, by the intervals of coefficient, excess_if_noisy and excess_if_partial. Other flags: the reward "
    f"overstates how often more of a feature wins, by {LEAST_OVERSTATED:.0%} (overstated), or a feature explains "
    f"{MOST:.0%} of its margins and not of the reference's (explained)."
)


@dataclass(frozen=True)
class CardOptions:
    """What is put on the card.

    ``implicit`` is POLICY,REFERENCE, whose implicit reward stands beside the explicit one; ``beta`` None takes the one
    that the policy was trained with. ``by`` names the column that says where a row is from; None takes the first of
    ``SOURCE_COLUMNS`` that is there with at most ``MOST_SOURCES`` values. ``judge`` scores the responses that the
    rewards pick as the best of n, beside gold; ``best_of`` is the largest n. ``seed`` is that of the resamples.
    """

    implicit: str | None = None
    beta: float | None = None
    any_reference: bool = False
    by: str | None = None
    judge: str | None = None
    best_of: int | None = None
    seed: int = 0


def rm_card(
    model: str,
    data: str,
    options: CardOptions,
    reading_options: ReadingOptions,
    scoring: ScoringOptions,
    *,
    out: Path | None = None,
    force: bool = False,
    reporter: Reporter,
) -> dict[str, Any]:
    """The card as one document; with ``out`` it is written there (``card.json``), with the scores as a table.

    ``model`` is a reward model, ``gold``, or ``python:MODULE:FUNCTION``. Run again with the same ``out``, it does not
    score again what a reward model and ``implicit`` have scored; functions and ``judge`` score anew.

    Raises DataError for data without comparisons and gold rewards, ModelError for a model that gives no finite scores,
    RecipeError for options that do not go together and for a judge that does not score, StoreError where ``out`` has
    the card of something else, or files that no card wrote.
    """
    check_options(options)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _card(model, data, options, reading_options, scoring, Path(folder), reporter)[0]
    content = content_of(data, local_path(data))
    scorers = scorer_identity(model, options.implicit)
    scorers += judge_identity(options.judge) if options.judge is not None else []
    identity = fingerprint([scorers, content, asdict(options), asdict(reading_options), asdict(scoring)])
    refuse_others_folder(out, "card", (CARD_FILE, SCORES_FILE), force)
    with RunFolder(out).lock():
        refuse_other(out / CARD_FILE, identity, force)
        card, table = _card(model, data, options, reading_options, scoring, out / ".scores", reporter)
        card["inputs"] = identity
        write_json(out / CARD_FILE, card)  # before the table: it says whose that is
        write_table(table, out / SCORES_FILE)
    return card


def check_options(options: CardOptions) -> None:
    """Raises RecipeError for settings of an implicit reward that is not there, and for a judge that does not score."""
    if options.implicit is None:
        for name, given in (("--beta", options.beta is not None), ("--any-reference", options.any_reference)):
            if given:
                fix = "name the policy and its reference with --implicit, or leave it out"
                raise RecipeError("only an implicit reward has this setting", where=name, fix=fix)
    if options.judge is not None:
        check_scores(options.judge)


def content_of(source: str, path: Path) -> str:
    """What changes with the data of a source that lies at a path; its name where it is not there."""
    if path.is_file():
        return file_hash(path)
    return folder_fingerprint(path, ["**/*"]) if path.is_dir() else source


def refuse_other(file: Path, identity: str, force: bool) -> None:
    """Raises StoreError where the file is the card of something else."""
    if file.is_file() and not force and read_json(file).get("inputs") != identity:
        raise StoreError(
            "the folder has the card of another model, other data or other options",
            where=str(file),
            fix="choose another --out, or give --force",
        )


def _card(
    model: str,
    data: str,
    options: CardOptions,
    reading_options: ReadingOptions,
    scoring: ScoringOptions,
    work: Path,
    reporter: Reporter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The card, and the table of scores."""
    of_pair = RewardOptions(beta=options.beta, any_reference=options.any_reference)
    rows = card_rows(model, data, options.implicit, of_pair, reading_options, reporter)
    # What can be wrong shows before a model scores, which takes long.
    sources = _sources(data, reading_options.split, options.by, rows.rows)
    labelled, labels = card_data(rows.rows, sources, data)
    _check_best_of(options, labelled, data)
    styled = styled_responses(rows.rows, (record for _, record in _records(data, reading_options.split).records))
    judged = judge_scores(options.judge, rows.rows, scoring) if options.judge and is_function(options.judge) else None
    rewards = card_rewards(model, rows, reading_options.max_response_tokens, scoring, work, reporter)
    if options.judge is not None and judged is None:
        judged = judge_scores(options.judge, rows.rows, scoring)
    labelled = replace(labelled, styled=styled, judged=judged, best_of=options.best_of)
    intervals: BootstrapOptions = {**DEFAULT_INTERVALS, "seed": options.seed}
    gold_scale = margin_scale(labelled, [row.gold or [] for row in rows.rows]) if shipped_gold(rows.rows) else None

    def sections_of(scored: Scored, comparable: bool) -> dict[str, Any]:
        topics = reward_card(labelled, scored.data, comparable_across_prompts=comparable, **intervals)
        scale = margin_scale(labelled, scored.data)
        topics["sycophancy"]["probe"] = opinion_section(rows.probes, scored.probes, scale, gold_scale, intervals)
        return topics

    explicit = sections_of(rewards.explicit, True)
    implicit = sections_of(rewards.implicit, False) if rewards.implicit is not None else None
    sections = {"explicit": explicit, "implicit": implicit}
    flags = [
        {"reward": name, **flag}
        for name, topics in sections.items()
        if topics is not None
        for flag in card_flags(topics)
    ]
    card: dict[str, Any] = {
        "schema_version": 1,
        "model": model,
        "implicit_model": options.implicit,
        "judge": options.judge,
        "implicit_reward": rows.pair.reward.words if rows.pair is not None else None,
        "data": data,
        "labels": labels,
        "reference": "gold" if labelled.gold_of_compared else "labels",
        "n_prompts": len(rows.rows),
        "n_responses": sum(len(row.responses) for row in rows.rows),
        "n_pairs": len(labelled.comparisons),
        "n_trained_prompts": _trained_prompts(model, rows),
        **rows.counts,
        "intervals": dict(intervals),
        **sections,
        "flags": flags,
        "alarm": ALARM,
        "warning": LOG_Z_WARNING if implicit is not None else None,
    }
    return card, _table(rows.rows, rewards, sources)


def _check_best_of(options: CardOptions, labelled: CardData, data: str) -> None:
    """Raises DataError where nothing measures the best of n, or where a prompt that counts has fewer responses."""
    if options.best_of is None:
        return
    sizes = [len(np.asarray(of_prompt)) for of_prompt in labelled.features["length"]]
    at = labelled.with_gold if options.judge is None else range(len(sizes))
    if not at:
        fix = "name a judge with --judge"
        raise DataError("the data has no gold rewards to measure the best of n by", where=data, fix=fix)
    check_pools([sizes[k] for k in at], [labelled.prompt_ids[k] for k in at], options.best_of)


def _trained_prompts(model: str, rows: CardRows) -> int:
    """How many of the data's prompts one of the card's models was trained on."""
    models = judging_models(f"rm:{model}") if not is_function(model) else []
    if rows.pair is not None:
        models = [*models, rows.pair.policy]
    return seen_in_training(models, (row.prompt_id for row in rows.rows))


def card_data(rows: Sequence[PreferenceRow], sources: Sequence[str | None] | None, data: str) -> tuple[CardData, str]:
    """The rows as the card's statistics take them, and whose labels count: the data's, or those of its gold rewards.

    A response's length is in characters; its format and agreement are the features that simulated annotators like.

    Raises DataError where there is neither a comparison nor a gold reward.
    """
    comparisons: list[Comparison] = [
        (k, pair.i, pair.j, pair.p, pair.weight) for k, row in enumerate(rows) for pair in splits.pairs(row)
    ]
    labels = "data"
    if not comparisons:
        labels = "gold"
        known = [k for k, row in enumerate(rows) if row.gold is not None]
        by_gold = all_pairs([rows[k].gold or [] for k in known])
        comparisons = [(known[k], i, j, p, weight) for k, i, j, p, weight in by_gold]
    if not comparisons:
        raise DataError(
            "the data has neither comparisons nor gold rewards", where=data, fix="name data with labelled responses"
        )
    features = {
        "length": [[float(len(text)) for text in row.responses] for row in rows],
        "format": [[feature("format", row.prompt, text) for text in row.responses] for row in rows],
        "sycophancy": [[feature("agreement", row.prompt, text) for text in row.responses] for row in rows],
    }
    ids = [row.prompt_id for row in rows]
    return CardData(ids, comparisons, features, [row.gold for row in rows], sources), labels


def _records(data: str, split: str) -> SourceRecords:
    return load(data, split=split, config=None, revision=None)


def styled_responses(rows: Sequence[PreferenceRow], records: Iterable[Record]) -> list[StyledResponses]:
    """RM-Bench's rows: those with three chosen and three rejected texts, which are in three styles."""
    styled = []
    number = {row.prompt_id: k for k, row in enumerate(rows)}
    for record in records:
        sides = [_texts(record.get(name)) for name in ("chosen", "rejected")]
        if not all(len(side) == len(STYLES) for side in sides):
            continue
        if not isinstance(prompt := record.get("prompt"), str) or (k := number.get(prompt_id(prompt))) is None:
            continue
        at = {text: r for r, text in enumerate(rows[k].responses)}
        indices = [[at[text] for text in side if text in at] for side in sides]
        if all(len(index) == len(STYLES) for index in indices):
            styled.append(StyledResponses(k, *indices))
    return styled


def _texts(cell: object) -> list[str]:
    """The texts in a cell with a list of them."""
    return [item for item in cell if isinstance(item, str)] if isinstance(cell, list) else []


def _sources(data: str, split: str, by: str | None, rows: Sequence[PreferenceRow]) -> list[str | None] | None:
    """Where each row is from, by a column of its first record; None where that is missing.

    Without ``by`` it is the first of ``SOURCE_COLUMNS`` with 1 to ``MOST_SOURCES`` values. None for the whole where the
    data has no such column.

    Raises DataError where the column that was asked for is not there, or has none or more values.
    """
    columns = SOURCE_COLUMNS if by is None else (by,)
    at = {row.source_row for row in rows}
    names = set[str]()
    values: dict[str, dict[int, str | None]] = {column: {} for column in columns}
    for number, record in _records(data, split).records:
        names.update(map(str, record))
        if number in at:
            for column, of_rows in values.items():
                value = record.get(column)
                of_rows[number] = None if value in (None, "") else str(value)
    for column in columns:
        if 0 < len({*values[column].values()} - {None}) <= MOST_SOURCES:
            return [values[column][row.source_row] for row in rows]
    if by is None:
        return None
    if by not in names:
        raise DataError(f"the data has no column {by!r}", where=data, fix=nearest(by, names))
    n = len({*values[by].values()} - {None})
    fix = f"name a column with 1 to {MOST_SOURCES} values"
    raise DataError(f"each value of {by!r} would be a source, and it has {n:,}", where=data, fix=fix)


def _table(
    rows: Sequence[PreferenceRow], rewards: CardRewards, sources: Sequence[str | None] | None
) -> list[dict[str, Any]]:
    """One row for each response."""
    table = []
    for k, row in enumerate(rows):
        for r, text in enumerate(row.responses):
            record: dict[str, Any] = {"prompt_id": row.prompt_id, "response_index": r, "n_chars": len(text)}
            record["explicit_reward"] = float(rewards.explicit.data[k][r])
            record["implicit_reward"] = float(rewards.implicit.data[k][r]) if rewards.implicit is not None else None
            record["gold_reward"] = row.gold[r] if row.gold is not None else None
            record["source"] = sources[k] if sources is not None else None
            table.append(record)
    return table
