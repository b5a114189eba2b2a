"""``duel label``: preference data from responses and a judge; a language model compares by written principles."""

from __future__ import annotations

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
from toolkit.measure.responses import read_responses
from toolkit.measure.sampling import PolicySampler, read_prompts, refusals_in, sample
from toolkit.preferences.rows import prompt_id, write_native
from toolkit.progress import Reporter


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
    source_rows: dict[str, int] = {}  # of samples there is none
    if sampler is None:
        answered = read_responses(selection)
        responses = [(row.prompt, row.responses) for row in answered]
        source_rows = {prompt_id(row.prompt): row.source_row for row in answered}
    else:
        prompts = read_prompts(selection)
        with refusals_in(selection):
            groups = sample(sampler, prompts, seed=selection.seed, purpose="label", reporter=reporter)
        responses = [
            (prompt, [s.response for s in of_prompt]) for (_, prompt), of_prompt in zip(prompts, groups, strict=True)
        ]
    written = [(prompt, [text for text in texts if text.strip()]) for prompt, texts in responses]
    usable = [(prompt, texts) for prompt, texts in written if len(set(texts)) > 1]
    if not usable:
        fix = "sample more, with --policy and --k"
        raise DataError("no prompt has two different responses", where=selection.data, fix=fix)
    if is_language_model(labelling.judge):
        labelled = label_rows(usable, labelling, reporter)
    else:
        reporter.line(f"judge {labelling.judge}")
        labelled = label_by_scores(labelling.judge, usable, labelling.options, labelling.labels)
    if not labelled.rows:
        failures = labelled.usage.failures if labelled.usage is not None else {"no finite score": labelled.n_failed}
        reasons = "; ".join(f"{times:,} x {reason}" for reason, times in failures.items())
        raise DataError(
            f"all {labelled.n_comparisons} comparisons failed: {reasons}",
            where=labelling.judge,
            fix="see what it answers in judgements.sqlite (duel's cache folder), or choose another --template",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [replace(row, source_row=source_rows.get(row.prompt_id, 0)) for row in labelled.rows]
    write_native(rows, out, selection.data)
    return {
        "out": str(out),
        "n_prompts": len(labelled.rows),
        "n_prompts_left_out": len(responses) - len(labelled.rows),
        "n_responses": sum(len(row.responses) for row in labelled.rows),
        "n_comparisons": labelled.n_comparisons - labelled.n_failed,
        "n_failed": labelled.n_failed,
        "n_tied": labelled.n_tied,
        "n_inconsistent": labelled.n_inconsistent,
        "n_principles": len(labelling.principles),
        "judge_usage": asdict(labelled.usage) if labelled.usage is not None else None,
    }
