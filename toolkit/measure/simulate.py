"""``duel simulate``: preference data from a policy, the known gold reward, and biased, noisy annotators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.files import refuse_existing
from toolkit.measure.compare import read_prompts, sample
from toolkit.models.resolve import resolve
from toolkit.preferences.rows import write_native
from toolkit.preferences.simulate import ANNOTATORS, agreement, simulate_preferences
from toolkit.progress import Reporter
from toolkit.recipe.schema import ModelSection


def simulate_data(
    *,
    policy: str,
    data: str,
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
    """Writes native rows to ``out`` (.jsonl.gz). Prompts without two distinct responses are left out, and counted."""
    refuse_existing(out, force)
    prompts = read_prompts(data, split=split, limit=limit, seed=seed)
    groups = sample(
        resolve(policy),
        prompts,
        ModelSection(dtype=dtype),  # type: ignore[arg-type]
        reporter,
        n=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose="simulate",
    )
    texts = [[row["response"] for row in group if row["response"].strip()] for group in groups]
    usable = [(prompt, found) for (_, prompt), found in zip(prompts, texts, strict=True) if len(set(found)) > 1]
    rows = simulate_preferences([prompt for prompt, _ in usable], [found for _, found in usable], ANNOTATORS, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_native(rows, out)
    return {
        "out": str(out),
        "n_prompts": len(rows),
        "n_prompts_left_out": len(prompts) - len(rows),
        "n_responses": sum(len(row.responses) for row in rows),
        "n_comparisons": sum(len(row.comparisons) for row in rows),
        "annotators": ", ".join(annotator.name for annotator in ANNOTATORS),
        "agreement_of_two_annotators": round(agreement(rows), 4),
    }
