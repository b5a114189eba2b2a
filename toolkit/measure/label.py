"""``duel label``: preference data from responses, a language model and written principles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import DataError, RecipeError
from toolkit.files import refuse_existing
from toolkit.judging import llm
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling, label_rows, load_principles
from toolkit.measure.compare import read_prompts, sample
from toolkit.models.resolve import resolve
from toolkit.preferences import splits
from toolkit.preferences.reading import from_parquet, read_preferences
from toolkit.preferences.rows import Prompt, write_native
from toolkit.preferences.samples import SAMPLES_FILE, by_prompt, read_samples
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection


def label_data(
    *,
    data: str,
    policy: str | None,
    judge: str,
    principles: str,
    draw: Literal["one", "all"],
    labels: Literal["soft", "hard"],
    judge_settings: JudgeSettings,
    k: int,
    temperature: float,
    max_new_tokens: int,
    limit: int | None,
    split: str,
    seed: int,
    out: Path,
    force: bool,
    dtype: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes native rows to ``out`` (.jsonl.gz), which ``data.source`` reads, and returns what was done.

    The responses are those of ``data``, whose own preferences are not looked at, or ``k`` samples of ``policy``.
    Answers are kept as they arrive: an interrupted call, run again, asks for the rest.
    """
    refuse_existing(out, force)
    if not llm.is_language_model(judge):
        raise RecipeError(
            f"{judge!r} cannot read a principle", where="--judge", fix="name llm:MODEL or openai:MODEL@BASE_URL"
        )
    texts_of = load_principles(principles)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    if policy is None:
        found = read_responses(data, split=split, limit=limit, seed=seed)
    else:
        prompts = read_prompts(data, split=split, limit=limit, seed=seed)
        groups = sample(
            resolve(policy),
            prompts,
            section,
            reporter,
            n=k,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            purpose="label",
        )
        found = [
            (prompt, [sample.response for sample in group]) for (_, prompt), group in zip(prompts, groups, strict=True)
        ]
    written = [(prompt, [text for text in texts if text.strip()]) for prompt, texts in found]
    usable = [(prompt, texts) for prompt, texts in written if len(set(texts)) > 1]
    if not usable:
        raise DataError("no prompt has two different responses", where=data, fix="sample more, with --policy and --k")
    labelling = Labelling(draw, labels, seed)
    made = label_rows(usable, judge, texts_of, labelling, JudgeOptions(section, judge_settings), reporter)
    if not made.rows:
        raise DataError(
            f"all {made.n_comparisons} comparisons failed",
            where=judge,
            fix="see what it answers in judgements.sqlite (duel's cache folder), or choose another --template",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_native(made.rows, out)
    return {
        "out": str(out),
        "n_prompts": len(made.rows),
        "n_prompts_left_out": len(found) - len(made.rows),
        "n_responses": sum(len(row.responses) for row in made.rows),
        "n_comparisons": made.n_comparisons - made.n_failed,
        "n_failed": made.n_failed,
        "n_tied": made.n_tied,
        "n_inconsistent": made.n_inconsistent,
        "n_principles": len(texts_of),
        "judge_usage": asdict(made.usage),
    }


def read_responses(data: str, *, split: str, limit: int | None, seed: int) -> list[tuple[Prompt, list[str]]]:
    """(prompt, responses) of preference data, or of all policies in a run folder's ``samples.parquet``.

    Raises DataError where ``data`` is neither.
    """
    path = Path(data).expanduser()
    file = path / SAMPLES_FILE if path.is_dir() else path
    if file.name != SAMPLES_FILE or not file.is_file():
        rows = splits.limit(read_preferences(data, split=split).rows, limit, seed)
        return [(row.prompt, row.responses) for row in rows]
    groups = by_prompt(read_samples(file, ["prompt_id", "prompt", "response"]))
    # The table shows conversations as text: the run's own data has them as messages.
    prompts: dict[str, Prompt] = {key: samples[0].prompt for key, samples in groups.items()}
    held_out = file.parent / "data" / "eval.parquet"
    if held_out.is_file():
        prompts |= {row.prompt_id: row.prompt for row in from_parquet(held_out) if row.prompt_id in prompts}
    return [(prompts[key], [sample.response for sample in groups[key]]) for key in list(prompts)[:limit]]
