"""``duel label``: preference data from responses, a language model and written principles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, RecipeError
from toolkit.judging.judge import check_judge
from toolkit.judging.llm import is_language_model
from toolkit.judging.principles import Labelling, label_rows
from toolkit.measure.once import once
from toolkit.measure.options import PromptSelection
from toolkit.measure.responses import read_responses
from toolkit.measure.sampling import PolicySampler, read_prompts, refusals_in, sample
from toolkit.preferences.rows import write_native
from toolkit.progress import Reporter


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
    prompts. Answers are stored as they arrive: an interrupted call, run again, asks for the rest.

    Raises RecipeError for a judge that cannot read a principle, DataError where there is nothing to compare or every
    comparison failed.
    """
    check_judge(labelling.judge)
    if not is_language_model(labelling.judge):
        raise RecipeError(
            f"{labelling.judge!r} cannot read a principle",
            where="--judge",
            fix="name llm:MODEL or openai:MODEL@BASE_URL",
        )
    if sampler is None:
        responses = [(row.prompt, row.responses) for row in read_responses(selection)]
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
    labelled = label_rows(usable, labelling, reporter)
    if not labelled.rows:
        reasons = "; ".join(f"{times:,} x {reason}" for reason, times in labelled.usage.failures.items())
        raise DataError(
            f"all {labelled.n_comparisons} comparisons failed: {reasons}",
            where=labelling.judge,
            fix="see what it answers in judgements.sqlite (duel's cache folder), or choose another --template",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_native(labelled.rows, out)
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
        "judge_usage": asdict(labelled.usage),
    }
