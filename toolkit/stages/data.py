"""Preference data of any format -> ``train.parquet`` and ``eval.parquet`` in the one shape, and a report of counts."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_json
from toolkit.models.encoding import CountedResponses, TextEncoder, text_encoder
from toolkit.models.rendering import (
    LAST_CHARACTERS,
    TemplateRefusesError,
    ends_in_thoughts,
    open_think_block,
    refusals_at,
)
from toolkit.models.resolve import require_policy, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.loading import place_in
from toolkit.preferences.reading import PreferenceData, data_warnings, read_preferences
from toolkit.preferences.rows import PreferenceRow, Prompt
from toolkit.preferences.solutions import Solution, as_prompts_of, solutions_to_parquet, split_solutions
from toolkit.preferences.steps import read_steps
from toolkit.preferences.tables import to_parquet
from toolkit.preferences.views import RowsAt, chunks, first_responses, one_ahead, prompt_of
from toolkit.progress import Reporter
from toolkit.recipe.checks import held_out_part
from toolkit.recipe.schema import DataSection
from toolkit.stages.contexts import DataContext

SIDES = ("train", "eval")
CHUNK = 1024  # rows that are tokenised together


def run(context: DataContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``train.parquet``, ``eval.parquet``, ``report.json``, and for a process reward model both sides' steps.

    Raises DataError where a side is empty, or has nothing that the arms could learn.
    """
    section = context.data
    sides, report = read_sides(section, context.data_seed)
    ref = resolve(context.model.name, context.model.revision)
    require_policy(ref)
    tokenizer = load_tokenizer(ref, context.model.chat_template)
    encoder = text_encoder(tokenizer, sides["train"][0].prompt, context.model.name)
    for name in SIDES:
        write = partial(to_parquet, path=out / f"{name}.parquet")
        _, counts = limited(name, sides[name], encoder, section, context.data_seed, write)
        report[name] = counts
        check_compared(name, counts, section, context.reward_model.kind)
        reporter.line(
            f"{name}: {counts['n_prompts']} prompts, {counts['n_responses']} responses, {counts['n_comparisons']} "
            "comparisons"
        )
        for note in limit_notes(name, counts, section):
            reporter.line(f"{name}: {note}")
    for warning in data_warnings(report):
        reporter.line(f"{section.source}: {warning}")
    if context.reward_model.kind == "process":
        source = str(context.reward_model.steps)
        steps, report["steps"], warnings = step_sides(source, section, context.data_seed, sides, encoder)
        for line in [*(f"{source}: {warning}" for warning in warnings), *write_steps(steps, report["steps"], out)]:
            reporter.line(line)
    write_json(out / "report.json", report)
    return {"report": report, "tokens": report["train"]["n_tokens"] + report["eval"]["n_tokens"]}


def step_sides(
    source: str, section: DataSection, seed: int, sides: Mapping[str, Sequence[PreferenceRow]], encoder: TextEncoder
) -> tuple[dict[str, list[Solution]], dict[str, Any], list[str]]:
    """The labelled solutions of ``train`` and ``eval``, the reader's report with their counts, and its warnings.

    ``sides`` are those of the preference data. Raises DataError where the steps cannot be read or a side is empty.
    """
    data = read_steps(source)
    solutions = as_prompts_of(data.solutions, encoder.conversational, source)
    report = {**asdict(data.report), "source_fingerprint": data.fingerprint}
    within: dict[str, list[Solution]] = {}
    # What the policies learned from must not test the rewards, and the other way round.
    known = [[(row.prompt_id, row.group) for row in sides[name]] for name in SIDES]
    for name, side in zip(SIDES, split_solutions(solutions, section.eval_fraction, seed, *known), strict=True):
        within[name] = limited_solutions(side, asked_prompts(name, section), seed, encoder, section.max_prompt_tokens)
        report[name] = {
            "n_prompts": len({solution.prompt_id for solution in within[name]}),
            "n_solutions": len(within[name]),
            "n_labels": sum(len(solution.counted) for solution in within[name]),
        }
        if not report[name]["n_labels"]:
            raise DataError(
                f"no {name} step is left: {report[name]}",
                where=source,
                fix="change data.eval_fraction, or raise data.max_prompt_tokens",
            )
    return within, report, data.report.warnings()


def write_steps(within: Mapping[str, Sequence[Solution]], report: Mapping[str, Any], out: Path) -> list[str]:
    """Writes ``train_steps.parquet`` and ``eval_steps.parquet``; returns a sentence about each."""
    lines = []
    for name, solutions in within.items():
        solutions_to_parquet(solutions, out / f"{name}_steps.parquet")
        counts = report[name]
        lines.append(
            f"{name} steps: {counts['n_prompts']} prompts, {counts['n_solutions']} solutions, "
            f"{counts['n_labels']} labels"
        )
    return lines


def limited_solutions(
    solutions: Sequence[Solution], n: int | None, seed: int, encoder: TextEncoder, max_prompt_tokens: int
) -> list[Solution]:
    """Those of at most ``n`` prompts within the limit on tokens: the prompts that a limit on preference data takes."""
    prompts = {solution.prompt_id: solution.prompt for solution in solutions}
    rows = [PreferenceRow(prompt_id, prompt, [], []) for prompt_id, prompt in prompts.items()]
    chosen = splits.limit(rows, n, seed, lambda row: 0 < len(encoder.prompt(row.prompt)) <= max_prompt_tokens)
    ids = {row.prompt_id for row in chosen}
    return [solution for solution in solutions if solution.prompt_id in ids]


def read_sides(section: DataSection, seed: int) -> tuple[dict[str, Sequence[PreferenceRow]], dict[str, Any]]:
    """The rows of ``train`` and ``eval``, and the reader's counts. A prompt is never on both sides.

    Raises DataError where the data cannot be read, either side has no prompt, or one is text and the other messages.
    """
    data = _read(section, section.source, section.split)
    report = {**data.report.to_dict(), "source": section.source, "source_fingerprint": data.fingerprint}
    if (part := held_out_part(section)) is not None:
        held_out = _read(section, *part)
        _check_one_kind(section, data, held_out)
        train = splits.places_apart(data.rows.keys(), held_out.rows.keys())
        report |= {"n_overlap": len(data.rows) - len(train), "eval_fingerprint": held_out.fingerprint}
        if not train:
            raise DataError(
                "every training prompt, or its group, is among the held-out ones",
                where=section.source,
                fix="name another data.eval_source or data.eval_split",
            )
        return {"train": RowsAt(data.rows, train), "eval": held_out.rows}, report
    train, evaluation = splits.split_places(data.rows.keys(), section.eval_fraction, seed)
    if not train or not evaluation:
        raise DataError(
            f"holding out {section.eval_fraction:g} of {len(data.rows)} prompts{_groups(data)} leaves one side empty",
            where=section.source,
            fix="change data.eval_fraction, or name data.eval_source",
        )
    return {"train": RowsAt(data.rows, train), "eval": RowsAt(data.rows, evaluation)}, report


def _groups(data: PreferenceData) -> str:
    return f" in {data.report.n_groups} groups, whole ones," if data.report.n_groups else ""


def _check_one_kind(section: DataSection, data: PreferenceData, held_out: PreferenceData) -> None:
    """Raises DataError where a text would never be found among messages: a prompt of both sides would stay on both."""
    if data.report.conversational == held_out.report.conversational:
        return
    kinds = {True: "chat messages", False: "plain text"}
    raise DataError(
        f"the training prompts are {kinds[data.report.conversational]}, and the held-out ones "
        f"{kinds[held_out.report.conversational]}",
        where=f"{data.report.source}, {held_out.report.source}",
        fix="data.conversational: true reads both as messages; false leaves transcripts as text",
    )


def _read(section: DataSection, source: str, split: str) -> PreferenceData:
    own = source == section.source  # another data set has neither its configurations nor its commits
    return read_preferences(
        source,
        split=split,
        config=section.config if own else None,
        revision=section.revision if own else None,
        columns=section.columns,
        conversational=section.conversational,
        annotators=section.annotators,
    )


def check_compared(side: str, counts: Mapping[str, int], section: DataSection, kind: str) -> None:
    """Raises DataError for training data without comparisons, which a reward model of this ``kind`` learns from."""
    if side == "train" and kind != "process" and not counts["n_comparisons"]:
        whose = f" by {', '.join(section.annotators)}" if section.annotators is not None else ""
        raise DataError(
            f"no training prompt has a comparison{whose}: {counts}",
            where=section.source,
            fix="take more of the data (data.train_prompts, data.max_responses, data.annotators), or label it first: "
            "duel label",
        )


def read_through(rows: Iterable[PreferenceRow]) -> None:
    deque(rows, maxlen=0)


def limited(
    side: str,
    rows: Sequence[PreferenceRow],
    encoder: TextEncoder,
    section: DataSection,
    seed: int,
    write: Callable[[Iterable[PreferenceRow]], object] = read_through,
) -> tuple[Sequence[PreferenceRow], dict[str, int]]:
    """The rows of a side within the recipe's limits, and counts. Raises DataError where none is left.

    ``write`` gets the rows one after the other while they are counted, so that each is read from disk once.

    A prompt that is too long is left out, and another takes its place until the limit on prompts is reached: the counts
    are of the prompts that were looked at. Of more than ``max_responses`` responses the first ones stay.
    """
    source = (section.eval_source if side == "eval" else None) or section.source
    fitting = fitting_prompts(rows, asked_prompts(side, section), seed, encoder, section.max_prompt_tokens, source)
    places = sorted(fitting.tokens)
    within = RowsAt(rows, places, section.max_responses)
    responses = Counter[str]()
    if within:
        write(_counted(RowsAt(rows, places), encoder, section, responses))
    counts = {
        "n_prompts": len(within),
        **{name: responses[name] for name in ("n_responses", "n_comparisons")},
        "n_tokens": sum(fitting.tokens.values()) + responses["n_tokens"],
        "n_long_prompts": fitting.n_long,
        "n_long_responses": responses["n_long_responses"],
        "n_left_out_responses": responses["n_left_out_responses"],
        "n_identical_pairs": responses["n_identical_pairs"],
        "n_unequal_weights": responses["n_unequal_weights"],
        "n_open_thoughts": sum(
            open_think_block(before, within[bisect_left(places, k)].responses) is not None
            for k, before in fitting.thoughts.items()
            if k in fitting.tokens
        ),
    }
    if not within:
        raise DataError(
            f"no {side} prompt is left: {counts}",
            where=section.source,
            fix="raise data.max_prompt_tokens, or change data.eval_fraction",
        )
    if side == "train" and 0 < counts["n_comparisons"] == counts["n_identical_pairs"]:
        raise DataError(
            f"every pair has two responses with the same tokens once cut at {section.max_response_tokens}",
            where=section.source,
            fix="raise data.max_response_tokens: nothing can be learned from equal responses",
        )
    return within, counts


@dataclass
class FittingPrompts:
    """The places of the rows whose prompts fit, with the prompts' tokens; how many that were looked at did not fit.

    ``thoughts`` has, by place, the end of each prompt that ends with the opening of a block of thoughts.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    n_long: int = 0
    thoughts: dict[int, str] = field(default_factory=dict)


def fitting_prompts(
    rows: Sequence[PreferenceRow], n: int | None, seed: int, encoder: TextEncoder, max_tokens: int, source: str
) -> FittingPrompts:
    """Of the rows whose prompts have 1 to ``max_tokens`` tokens, those that :func:`splits.limit` takes.

    Raises DataError, with the row, for a conversation that the chat template refuses.
    """
    fitting = FittingPrompts()
    order = chunks(splits.limit_order(rows, n, seed), CHUNK)
    asked = one_ahead((places, [prompt_of(rows, k) for k in places]) for places in order)
    read_ahead = ((places, _prompts_read(prompts, rows, places, encoder, source)) for places, prompts in asked)
    # Conversations are read by the main thread: no other one can be interrupted where a chat template does not end.
    for places, read in read_ahead if encoder.conversational else one_ahead(read_ahead):
        for k, (length, written) in zip(places, read, strict=False):
            if not 0 < length <= max_tokens:
                fitting.n_long += 1
                continue
            fitting.tokens[k] = length
            if ends_in_thoughts(written):
                fitting.thoughts[k] = written[-LAST_CHARACTERS:]
            if len(fitting.tokens) == n:
                return fitting
    return fitting


def _prompts_read(
    prompts: Sequence[Prompt],
    rows: Sequence[PreferenceRow],
    places: Sequence[int],
    encoder: TextEncoder,
    source: str,
) -> Iterable[tuple[int, str]]:
    """Of each prompt the number of tokens, and what the model reads. Prompts are read together where all can be.

    They are those of ``rows`` at ``places``.
    """
    try:
        written = encoder.written(prompts)
        return list(zip(encoder.prompt_lengths(prompts, written), written, strict=True))
    except TemplateRefusesError:
        return _one_by_one(prompts, rows, places, encoder, source)


def _one_by_one(
    prompts: Sequence[Prompt], rows: Sequence[PreferenceRow], places: Sequence[int], encoder: TextEncoder, source: str
) -> Iterator[tuple[int, str]]:
    """The prompts as they are asked for: a row behind the last one of these must not be refused."""
    for k, prompt in zip(places, prompts, strict=True):
        with refusals_at(place_in(source, rows[k].source_row)):
            yield len(encoder.prompt(prompt)), encoder.written([prompt])[0]


def _counted(
    rows: Iterable[PreferenceRow], encoder: TextEncoder, section: DataSection, counts: Counter[str]
) -> Iterator[PreferenceRow]:
    """The rows with their first responses. ``counts`` gets those over the cut responses and their pairs."""
    most = section.max_responses if section.max_responses is not None else sys.maxsize
    # These ask the chat template, which only the main thread can interrupt.
    _ = encoder.lead, encoder.end_id, encoder.special_tokens.ends

    def tokenised() -> Iterator[tuple[list[PreferenceRow], list[PreferenceRow], CountedResponses]]:
        for whole in one_ahead(chunks(rows, CHUNK)):
            chunk = [row if len(row.responses) <= most else first_responses(row, most) for row in whole]
            texts = [text for row in chunk for text in row.responses]
            yield whole, chunk, encoder.counted_responses(texts, section.max_response_tokens)

    alone: set[float] = set()  # weights of judgements that are their prompts' only ones, two at most
    n_alone = 0
    for whole, chunk, responses in one_ahead(tokenised()):
        counts["n_left_out_responses"] += sum(max(0, len(row.responses) - most) for row in whole)
        counts["n_responses"] += len(responses.lengths)
        counts["n_long_responses"] += responses.n_cut
        counts["n_tokens"] += sum(responses.lengths)
        first = n_pairs = n_identical = 0
        for row in chunk:
            pairs = {(c.winner, c.loser) if c.winner < c.loser else (c.loser, c.winner) for c in row.comparisons}
            n_pairs += len(pairs)
            for i, j in pairs:
                n_identical += responses.equal(first + i, first + j)
            first += len(row.responses)
            if 1 <= len(row.comparisons) <= 2 and len(judged := splits.labelled_pairs(row.comparisons)) == 1:
                n_alone += 1
                if len(alone) < 2:
                    alone.add(judged[0].weight)
        counts["n_comparisons"] += n_pairs
        counts["n_identical_pairs"] += n_identical
        yield from chunk
    counts["n_unequal_weights"] = n_alone if len(alone) > 1 else 0


def asked_prompts(side: str, section: DataSection) -> int | None:
    """How many prompts the recipe asks for on this side; None for all."""
    return section.train_prompts if side == "train" else section.eval_prompts


def limit_notes(side: str, counts: Mapping[str, int], section: DataSection) -> list[str]:
    """What the recipe's limits leave out or cut of a side with these counts, a sentence for each.

    >>> counts = {"n_prompts": 34, "n_responses": 68, "n_long_prompts": 62, "n_long_responses": 17}
    >>> section = DataSection(train_prompts=96, max_prompt_tokens=64, max_response_tokens=16)
    >>> for note in limit_notes("train", counts | {"n_left_out_responses": 0}, section):
    ...     print(note)
    62 prompts are left out: they have more tokens than data.max_prompt_tokens = 64
    34 prompts are there, and data.train_prompts asks for 96
    17 of 68 responses (25%) are cut: they have more tokens than data.max_response_tokens = 16
    """
    asked, n, n_responses = asked_prompts(side, section), counts["n_prompts"], counts["n_responses"]
    n_long, n_cut, n_further = (
        counts[f"n_{name}"] for name in ("long_prompts", "long_responses", "left_out_responses")
    )
    # Reports of earlier versions do not have these.
    n_identical, n_thoughts = counts.get("n_identical_pairs", 0), counts.get("n_open_thoughts", 0)
    n_weighted = counts.get("n_unequal_weights", 0)
    limit = f"they have more tokens than data.max_prompt_tokens = {section.max_prompt_tokens}"
    notes = {
        f"{n_long} prompts are left out: {limit}": n_long,
        f"{n} prompts are there, and data.{side}_prompts asks for {asked}": asked is not None and n < asked,
        f"{n_further} responses are left out: data.max_responses = {section.max_responses}": n_further,
        f"{n_cut} of {n_responses} responses ({n_cut / max(1, n_responses):.0%}) are cut: they have more tokens than "
        f"data.max_response_tokens = {section.max_response_tokens}": n_cut,
        f"{n_identical} of {counts.get('n_comparisons')} pairs have two responses with the same tokens once cut: "
        "training learns nothing from them": n_identical,
        f"{n_weighted} prompts have a single comparison each, of unequal weights: these have no effect, since every "
        "prompt counts once": side == "train" and n_weighted,
        f"{n_thoughts} prompts end inside a block of thoughts that their responses do not close: close it in the chat "
        "template": n_thoughts,
    }
    return [note for note, applies in notes.items() if applies]
