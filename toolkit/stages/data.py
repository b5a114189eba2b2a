"""Preference data of any format -> ``train.parquet`` and ``eval.parquet`` in the one shape, and a report of counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_json
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.reading import data_warnings, read_preferences, to_parquet
from toolkit.preferences.rows import PreferenceRow
from toolkit.progress import Reporter
from toolkit.recipe.schema import DataSection
from toolkit.stages.contexts import DataContext


def run(context: DataContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``train.parquet``, ``eval.parquet``, ``report.json``. Raises DataError where either side is empty."""
    section: DataSection = context.data
    train, evaluation, report = split(section, context.seed)

    tokenizer = load_tokenizer(resolve(context.model.name, context.model.revision), context.model.chat_template)
    encoder = text_encoder(tokenizer, (train or evaluation)[0].prompt, context.model.name)
    sides = {"train": (train, section.train_prompts), "eval": (evaluation, section.eval_prompts)}
    for name, (rows, limit) in sides.items():
        rows = splits.limit(rows, limit, context.seed) if limit else rows
        rows, counts = fit(rows, encoder, section)
        if not rows:
            raise DataError(
                f"no {name} prompt is left: {counts}",
                where=section.source,
                fix="raise data.max_prompt_tokens, or change data.eval_fraction",
            )
        to_parquet(rows, out / f"{name}.parquet")
        report[name] = counts
        reporter.line(
            f"{name}: {counts['n_prompts']} prompts, {counts['n_responses']} responses, {counts['n_comparisons']} "
            f"comparisons ({counts['n_long_prompts']} prompts too long and left out, "
            f"{counts['n_long_responses']} responses longer than {section.max_response_tokens} tokens, to be cut)"
        )
    for warning in data_warnings(report):
        reporter.line(f"{section.source}: {warning}")
    write_json(out / "report.json", report)
    return {"report": report, "tokens": report["train"]["n_tokens"] + report["eval"]["n_tokens"]}


def split(section: DataSection, seed: int) -> tuple[list[PreferenceRow], list[PreferenceRow], dict[str, Any]]:
    """Training rows, held-out rows, and the reader's counts. A prompt is never on both sides."""
    reading: dict[str, Any] = {
        "columns": section.columns,
        "conversational": section.conversational,
        "annotators": section.annotators,
    }
    # A file is its own split: names of splits mean something on the hub alone.
    local = Path(section.source).expanduser().exists() or "/" not in section.source
    data = read_preferences(
        section.source, split=section.split, config=section.config, revision=section.revision, **reading
    )
    report = {**data.report.to_dict(), "source": section.source, "source_fingerprint": data.fingerprint}
    if section.eval_source or (section.eval_split and not local):
        held_out = read_preferences(
            section.eval_source or section.source,
            split=section.eval_split or section.split,
            config=section.config,
            revision=section.revision,
            **reading,
        )
        train, n_overlap = splits.overlap(data.rows, held_out.rows)
        report |= {"n_overlap": n_overlap, "eval_fingerprint": held_out.fingerprint}
        return train, held_out.rows, report
    train, evaluation = splits.split_rows(data.rows, section.eval_fraction, seed)
    if not train or not evaluation:
        raise DataError(
            f"holding out {section.eval_fraction:g} of {len(data.rows)} prompts leaves one side empty",
            where=section.source,
            fix="change data.eval_fraction, or name data.eval_source",
        )
    return train, evaluation, report


def fit(
    rows: list[PreferenceRow], encoder: TextEncoder, section: DataSection
) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Leave out prompts that are too long, keep ``max_responses`` of the responses, and count both."""
    kept: list[PreferenceRow] = []
    counts = dict.fromkeys(
        (
            "n_prompts",
            "n_responses",
            "n_comparisons",
            "n_tokens",
            "n_long_prompts",
            "n_long_responses",
            "n_left_out_responses",
        ),
        0,
    )
    for row in rows:
        prompt_tokens = len(encoder.prompt(row.prompt))
        if not 0 < prompt_tokens <= section.max_prompt_tokens:
            counts["n_long_prompts"] += 1
            continue
        if section.max_responses is not None and len(row.responses) > section.max_responses:
            counts["n_left_out_responses"] += len(row.responses) - section.max_responses
            row = keep_responses(row, section.max_responses)
        responses, truncated = encoder.responses(row.responses, section.max_response_tokens)
        counts["n_long_responses"] += sum(truncated)
        counts["n_tokens"] += prompt_tokens + sum(map(len, responses))
        counts["n_prompts"] += 1
        counts["n_responses"] += len(row.responses)
        counts["n_comparisons"] += len(splits.pairs(row))
        kept.append(row)
    return kept, counts


def keep_responses(row: PreferenceRow, n: int) -> PreferenceRow:
    """The row with its first ``n`` responses and the comparisons between them."""
    comparisons = [c for c in row.comparisons if max(c.winner, c.loser) < n]
    gold = row.gold[:n] if row.gold is not None else None
    return replace(row, responses=row.responses[:n], comparisons=comparisons, gold=gold)
