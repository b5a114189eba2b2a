"""``duel simulate``: preference data from responses, the known gold reward, and biased, noisy annotators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import read_json, table_metadata, write_json
from toolkit.measure.once import once
from toolkit.measure.options import PromptSelection
from toolkit.measure.responses import Answered, has_responses, read_responses
from toolkit.measure.sampling import PolicySampler, sampled_responses
from toolkit.preferences.rows import PreferenceRow, prompt_id, write_native
from toolkit.preferences.simulate import ANNOTATORS, Annotator, agreement, simulate_preferences
from toolkit.preferences.tables import to_parquet
from toolkit.progress import Reporter

TRUTH_KEY = "duel.truth"


DEFAULT_POLICY = "smollm2-135m"


def policy_to_sample(policy: str | None, selection: PromptSelection, *, prefer_own: bool) -> str | None:
    """Whose responses are labelled: those of the named policy; else, where they are preferred, the data's own if it has
    any (None); else the default policy's."""
    if policy is not None:
        return policy
    return None if prefer_own and has_responses(selection) else DEFAULT_POLICY


@dataclass(frozen=True)
class Simulated:
    """Rows, how many prompts were left out, and where the gold rewards come from: the data, or the shipped function."""

    rows: list[PreferenceRow]
    n_left_out: int
    gold: str


def _truth_file(path: Path) -> Path:
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return path.with_name(f"{name}.truth.json")


@once(_truth_file)
def simulate_data(
    sampler: PolicySampler | None,
    selection: PromptSelection,
    annotators: Sequence[Annotator] = ANNOTATORS,
    *,
    out: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes preference rows to ``out``: a .parquet file, else gzipped JSON lines in the native format.

    The responses are samples of the policy, or those of the data where there is no ``sampler``. Prompts without two
    distinct responses are left out, and counted. The truth is recorded (:func:`recorded_truth`): every annotator's
    settings, the seed, and where the gold rewards come from.

    Raises DataError where no prompt has two distinct responses.
    """
    answered: Sequence[Answered]
    if sampler is not None:
        answered = sampled_responses(sampler, selection, purpose="simulate", reporter=reporter)
    else:
        answered = read_responses(selection, reporter)
    simulated = _simulate(answered, annotators, selection)
    rows = simulated.rows
    truth = {
        "annotators": [asdict(annotator) for annotator in annotators],
        "gold": simulated.gold,
        "seed": selection.seed,
        "data": selection.data,
        "policy": sampler.policy if sampler is not None else None,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        to_parquet(rows, out, {TRUTH_KEY: json.dumps(truth)})
    else:
        write_json(_truth_file(out), truth)
        write_native(rows, out)
    agree = agreement(rows) if len(annotators) > 1 else None
    return {
        "out": str(out),
        "n_prompts": len(rows),
        "n_prompts_left_out": simulated.n_left_out,
        "n_responses": sum(len(row.responses) for row in rows),
        "n_comparisons": sum(len(row.comparisons) for row in rows),
        "annotators": ", ".join(annotator.name for annotator in annotators),
        "agreement_of_two_annotators": None if agree is None else round(agree, 4),
        "gold": simulated.gold,
    }


def recorded_truth(path: Path) -> dict[str, Any] | None:
    """What is true of simulated data: ``annotators`` with their settings, ``gold`` ("data" or "function"), ``seed``.

    It is in the metadata of a .parquet file, and beside another file, in ``NAME.truth.json``. None where there is none.
    """
    if path.suffix == ".parquet":
        text = table_metadata(path, error=DataError).get(TRUTH_KEY)
        return None if text is None else dict(json.loads(text))
    file = _truth_file(path)
    return read_json(file) if file.is_file() else None


def _simulate(answered: Sequence[Answered], annotators: Sequence[Annotator], selection: PromptSelection) -> Simulated:
    """Labels of the annotators. The data's own gold rewards count where all rows have them."""
    usable = [row for row in map(_without_blanks, answered) if len(set(row.responses)) > 1]
    if not usable:
        fix = "sample more, with --policy and --k"
        raise DataError("no prompt has two different responses", where=selection.data, fix=fix)
    gold = [row.gold for row in usable if row.gold is not None]
    known = len(gold) == len(usable)
    rows = simulate_preferences(
        [row.prompt for row in usable],
        [row.responses for row in usable],
        annotators,
        selection.seed,
        gold if known else None,
    )
    groups = {prompt_id(row.prompt): row.group for row in usable}
    rows = [replace(row, group=groups[row.prompt_id]) for row in rows]
    return Simulated(rows, len(answered) - len(rows), "data" if known else "function")


def _without_blanks(row: Answered) -> Answered:
    written = [k for k, text in enumerate(row.responses) if text.strip()]
    gold = None if row.gold is None else [row.gold[k] for k in written]
    return replace(row, responses=[row.responses[k] for k in written], gold=gold)
