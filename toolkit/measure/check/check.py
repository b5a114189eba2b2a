"""``duel check``: what is valid but wrong in preference data, for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.measure.check.findings import Collector, Finding, render
from toolkit.measure.check.labels import check_annotators, check_leak, check_length, check_repeats
from toolkit.measure.check.rows import CheckedRow, CheckedRows, SourceOptions, read_rows
from toolkit.measure.check.texts import check_encoding, check_rendered
from toolkit.measure.check.tokens import Limits, TokenChecks
from toolkit.models.rendering import Markers
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer, require_chat_template


@dataclass(frozen=True)
class CheckOptions:
    """What is checked. ``limit`` takes the first rows; ``held_out`` is a source whose prompts must not be in the data.

    ``likelihood`` is the number of rows that ``off_policy`` scores with the model; 0 leaves out the forward pass.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    limits: Limits = field(default_factory=Limits)
    limit: int | None = None
    held_out: str | None = None
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
    checked = read_rows(data, options.source, options.limit, collector)
    notes = list(checked.notes)
    for kind in (False, True):
        rows = [row for row in checked.rows if row.conversational is kind]
        if rows:
            notes += _check_tokens(rows, ref, tokenizer, options.limits, collector)
    check_encoding(checked.rows, collector)
    check_length(checked.rows, collector)
    check_repeats(checked.rows, checked.unit, collector)
    check_annotators(checked.rows, collector)
    check_leak(checked.rows, _held_out(options), checked.unit, collector)
    if options.likelihood and checked.rows:
        from toolkit.measure.check.likelihood import LikelihoodSample, check_likelihood

        sample = LikelihoodSample(options.likelihood, options.seed)
        check_likelihood(ref, tokenizer, checked.rows, sample, options.limits, collector)
    return CheckResult(checked.n_rows, collector.findings(), tuple(notes), checked.unit, len(collector.refused))


def _check_tokens(
    rows: Sequence[CheckedRow], ref: ModelRef, tokenizer: Any, limits: Limits, collector: Collector
) -> list[str]:
    """The checks of what the tokenizer makes of rows that are all text, or all messages."""
    if rows[0].conversational:
        require_chat_template(tokenizer, ref.spec)
    markers = Markers(tokenizer)
    checks = TokenChecks(tokenizer, rows, limits, markers, collector)
    checks.run()
    checks.check_cut()
    check_rendered(rows, markers, collector)
    n_long = checks.long_prompts()
    limit = f"more tokens than max_prompt_tokens = {limits.max_prompt_tokens}"
    return [f"{n_long} left out of a run: the prompt has {limit}"] if n_long else []


def _held_out(options: CheckOptions) -> list[CheckedRow] | None:
    if options.held_out is None:
        return None
    held_out: CheckedRows = read_rows(options.held_out, options.source, None, None)
    return held_out.rows
