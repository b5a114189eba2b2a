"""``duel label``: preference data from responses and a judge; a language model compares by written principles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, RecipeError
from toolkit.judging.judge import check_judge
from toolkit.judging.llm import is_language_model
from toolkit.judging.principles import Labelling, label_rows
from toolkit.judging.score_labels import label_by_scores
from toolkit.measure.once import once
from toolkit.measure.options import PromptSelection
from toolkit.measure.responses import Answered, read_responses
from toolkit.measure.sampling import PolicySampler, sampled_responses
from toolkit.preferences.rows import PreferenceRow, write_native
from toolkit.progress import Reporter
from toolkit.storage.lazy import Computed
from toolkit.storage.spilled import Spill


def check_labelling(labelling: Labelling) -> None:
    """Raises RecipeError for a judge that cannot label: a language model needs principles, no other can read one."""
    check_judge(labelling.judge)
    if labelling.judge.startswith("file:"):
        fix = "name llm:, openai:, rm:, implicit:, python: or gold"
        raise RecipeError("recorded judgements cannot label other responses", where="--judge", fix=fix)
    if is_language_model(labelling.judge) and not labelling.principles:
        fix = "--principles hhh, or a file with a principle on each line"
        raise RecipeError(f"{labelling.judge!r} needs a principle to compare by", where="--principles", fix=fix)
    if not is_language_model(labelling.judge) and labelling.principles:
        fix = "name llm:MODEL or openai:MODEL@BASE_URL, or leave --principles out: it labels by its scores"
        raise RecipeError(f"{labelling.judge!r} cannot read a principle", where="--judge", fix=fix)


@once()
def label_data(
    labelling: Labelling,
    selection: PromptSelection,
    *,
    sampler: PolicySampler | None = None,
    out: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes native rows to ``out`` (.jsonl.gz), which ``data.source`` reads, and returns a summary.

    The responses are those of the data, whose own preferences are not read, or the samples of ``sampler`` for its
    prompts. A language model compares them by the principles, any other judge by its scores. A language model's answers
    are stored as they arrive: an interrupted call, run again, asks for the rest.

    Raises RecipeError for a judge that cannot read a principle or lacks one, DataError where there is nothing to
    compare or every comparison failed.
    """
    check_labelling(labelling)
    answered: Sequence[Answered]
    if sampler is None:
        answered = read_responses(selection, reporter)
    else:
        answered = sampled_responses(sampler, selection, purpose="label", reporter=reporter)
    usable = Spill()  # prompts with their distinct responses, the rows of the data that they are from, and groups
    for row in answered:
        texts = [text for text in dict.fromkeys(row.responses) if text.strip()]
        if len(texts) > 1:
            usable.append((row.prompt, texts, row.source_row, row.group))
    responses = Computed(range(len(usable)), lambda k: tuple(usable[k][:2]))
    if not len(usable):
        fix = "sample more, with --policy and --k"
        raise DataError("no prompt has two different responses", where=selection.data, fix=fix)
    if is_language_model(labelling.judge):
        labelled = label_rows(responses, labelling, reporter)
    else:
        reporter.line(f"judge {labelling.judge}")
        labelled = label_by_scores(labelling.judge, responses, labelling.options, labelling.labels)
    if not labelled.rows:
        failures = labelled.usage.failures if labelled.usage is not None else {"no finite score": labelled.n_failed}
        reasons = "; ".join(f"{times:,} x {reason}" for reason, times in failures.items())
        raise DataError(
            f"all {labelled.n_comparisons} comparisons failed: {reasons}",
            where=labelling.judge,
            fix="see what it answers in judgements.sqlite (duel's cache folder), or choose another --template",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_native(_as_in_data(labelled.rows, usable), out, selection.data)
    return {
        "out": str(out),
        "n_prompts": len(labelled.rows),
        "n_prompts_left_out": len(answered) - len(labelled.rows),
        "n_responses": sum(len(row.responses) for row in labelled.rows),
        "n_comparisons": labelled.n_comparisons - labelled.n_failed,
        "n_failed": labelled.n_failed,
        "n_tied": labelled.n_tied,
        "n_inconsistent": labelled.n_inconsistent,
        "n_principles": len(labelling.principles),
        "judge_usage": asdict(labelled.usage) if labelled.usage is not None else None,
    }


def _as_in_data(rows: Sequence[PreferenceRow], labelled: Spill) -> Iterator[PreferenceRow]:
    """The rows with their places and groups in the data; ``labelled`` has their prompts in this order, and others."""
    remaining = (labelled[k] for k in range(len(labelled)))
    for row in rows:
        number, group = next(of_data for prompt, _, *of_data in remaining if prompt == row.prompt)
        yield replace(row, source_row=number, group=group)
