"""``duel simulate``: preference data from a policy, the known gold reward, and biased, noisy annotators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.files import refuse_existing
from toolkit.measure.options import PromptSelection
from toolkit.measure.sampling import PolicySampler, read_prompts, refusals_in, sample
from toolkit.preferences.rows import write_native
from toolkit.preferences.simulate import ANNOTATORS, agreement, simulate_preferences
from toolkit.progress import Reporter
from toolkit.storage.locks import holds_out


@holds_out
def simulate_data(
    sampler: PolicySampler, selection: PromptSelection, *, out: Path, force: bool, reporter: Reporter
) -> dict[str, Any]:
    """Writes native rows to ``out`` (.jsonl.gz). Prompts without two distinct responses are left out, and counted."""
    refuse_existing(out, force)
    prompts = read_prompts(selection)
    with refusals_in(selection):
        groups = sample(sampler, prompts, seed=selection.seed, purpose="simulate", reporter=reporter)
    texts = [[s.response for s in of_prompt if s.response.strip()] for of_prompt in groups]
    usable = [
        (prompt, responses) for (_, prompt), responses in zip(prompts, texts, strict=True) if len(set(responses)) > 1
    ]
    rows = simulate_preferences(
        [prompt for prompt, _ in usable], [responses for _, responses in usable], ANNOTATORS, selection.seed
    )
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
