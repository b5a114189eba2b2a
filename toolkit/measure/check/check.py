"""``duel check``: what is valid but wrong in preference data, for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.measure.check.findings import Collector, Finding, render
from toolkit.measure.check.labels import Annotators, Lengths, Repeats
from toolkit.measure.check.leak import check_leak
from toolkit.measure.check.rows import SourceOptions, read_rows
from toolkit.measure.check.stored import CheckedRow, CheckedRows
from toolkit.measure.check.texts import RenderedTexts, check_encoding
from toolkit.measure.check.tokens import Limits, TokenChecks
from toolkit.models.rendering import Markers
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer, require_chat_template


@dataclass(frozen=True)
class CheckOptions:
    """What is checked. ``limit`` takes the first rows; ``held_out`` is a source whose prompts must not be in the data,
    in ``held_out_split`` (None: the split of the data).

    ``likelihood`` is the number of rows that ``off_policy`` scores with the model; 0 leaves out the forward pass.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    limits: Limits = field(default_factory=Limits)
    limit: int | None = None
    held_out: str | None = None
    held_out_split: str | None = None
    likelihood: int = 0
    seed: int = 0
    chat_template: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """What ``duel check`` says. ``notes`` are about rows that a run leaves out; ``unit`` is "line" or "row".

    For one of the ``n_refused`` rows a run refuses the whole data. Findings are in the order of
    :data:`toolkit.measure.check.findings.KINDS`.
    """

    n_rows: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    unit: str = "row"
    n_refused: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As in ``duel check --json``."""
        return {
            "n_rows": self.n_rows,
            "n_refused": self.n_refused,
            "findings": [finding.as_dict() for finding in self.findings],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return render(self.n_rows, self.findings, self.notes, self.unit)


def check_data(data: str, model: str, options: CheckOptions) -> CheckResult:
    """Read the data and say what is wrong with it for this model.

    Raises DataError where the source cannot be read or none of its rows can be, and ModelError where there is no such
    model, or conversations meet a tokenizer without a chat template.
    """
    ref = resolve(model, options.revision)
    return check_with(data, ref, load_tokenizer(ref, options.chat_template), options)


def check_with(data: str, ref: ModelRef, tokenizer: Any, options: CheckOptions) -> CheckResult:
    """:func:`check_data` with a tokenizer that is loaded."""
    collector = Collector("row")
    read = read_rows(data, options.source, options.limit, collector)
    rows, notes = read.rows, list(read.notes)
    of_kinds = [
        (places, _TextChecks(ref, tokenizer, options.limits, kind, collector))
        for kind in (False, True)
        if len(places := rows.places(conversational=kind))
    ]
    lengths, repeats, annotators = Lengths(), Repeats(read.unit, collector), Annotators()
    if len(of_kinds) > 1:  # what the first rows of a kind are depends on the order
        for places, checks in of_kinds:
            for chunk in rows.chunks(places):
                checks.take(chunk)
    for chunk in rows.chunks(range(len(rows))):
        if len(of_kinds) == 1:
            of_kinds[0][1].take(chunk)
        check_encoding(chunk, collector)
        for check in (lengths, repeats, annotators):
            check.take(chunk)
    for _, checks in of_kinds:
        notes += checks.check(rows)
    lengths.check(rows, collector)
    repeats.check(rows)
    annotators.check(rows, collector)
    check_leak(rows, _held_out(data, options), read.unit, collector)
    if options.likelihood and rows:
        from toolkit.measure.check.likelihood import LikelihoodSample, check_likelihood

        sample = LikelihoodSample(options.likelihood, options.seed)
        check_likelihood(ref, tokenizer, rows, sample, options.limits, collector)
    return CheckResult(read.n_rows, collector.findings(), tuple(notes), read.unit, len(collector.refused))


class _TextChecks:
    """The checks of what the tokenizer makes of rows that are all text, or all messages (``conversational``)."""

    def __init__(
        self, ref: ModelRef, tokenizer: Any, limits: Limits, conversational: bool, collector: Collector
    ) -> None:
        if conversational:
            require_chat_template(tokenizer, ref.spec)
        markers = Markers(tokenizer)
        self.tokens = TokenChecks(tokenizer, conversational, limits, markers, collector)
        self.rendered = RenderedTexts(markers, collector)

    def take(self, rows: Sequence[CheckedRow]) -> None:
        self.tokens.take(rows)
        self.rendered.take(rows)

    def check(self, rows: CheckedRows) -> list[str]:
        """What all rows together show. Returns sentences on those that a run leaves out."""
        self.tokens.cut_unevenly(rows)
        self.rendered.missing_ends(rows)
        n_long = self.tokens.long_prompts()
        limit = f"more tokens than max_prompt_tokens = {self.tokens.limits.max_prompt_tokens}"
        return [f"{n_long} left out of a run: the prompt has {limit}"] if n_long else []


def _held_out(data: str, options: CheckOptions) -> CheckedRows | None:
    if options.held_out is None:
        return None
    # Its prompts alone count, so others may have compared its responses.
    source = replace(options.source, split=options.held_out_split or options.source.split, annotators=None)
    if options.held_out != data:  # which has configurations and a commit of its own
        source = replace(source, config=None, revision=None)
    return read_rows(options.held_out, source, None, None).rows
