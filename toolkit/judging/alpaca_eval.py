"""Judgements as AlpacaEval's ``annotations.json``: one object for each instruction, and a preference from 1 to 2."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import DataError
from toolkit.files import write_bytes
from toolkit.judging.records import Judgement
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.rows import readable


def check_samples(pairs: Sequence[tuple[str, str]], responses: PolicyResponses) -> None:
    """Raises DataError where a policy of these pairs has several samples for a prompt: the format has one output."""
    for policy, baseline in pairs:
        for policy_texts, baseline_texts in zip(responses.texts[policy], responses.texts[baseline], strict=True):
            _check_samples(policy, baseline, len(policy_texts), len(baseline_texts))


def _check_samples(policy: str, baseline: str, n_policy: int, n_baseline: int) -> None:
    if n_policy > 1 or n_baseline > 1:
        raise DataError(
            f"{policy!r} has {n_policy} samples and {baseline!r} {n_baseline} for one prompt",
            where="AlpacaEval's annotations hold one output of each",
            fix="export judgements of one sample per prompt",
        )


def annotation_rows(judgements: Sequence[Judgement], responses: PolicyResponses) -> list[dict[str, Any]]:
    """One object for each (policy, baseline, judge) and prompt: 1 + the mean preference over orders, seeds and repeats.

    ``preference`` is null where every judgement of an order failed, and ``error`` says why. ``swapped`` is there
    where the pair was shown in one order only.

    Raises:
        DataError: several samples for a prompt, or judgements of other prompts: the format has one output.
    """
    row_of = {prompt_id: row for row, prompt_id in enumerate(responses.prompt_ids)}
    groups: dict[tuple[str, str, str, str], list[Judgement]] = defaultdict(list)
    for j in judgements:
        if j.prompt_id not in row_of:
            raise DataError(
                "a judgement is of another prompt", where=j.prompt_id, fix="name the samples it was made on"
            )
        groups[j.policy, j.baseline, j.judge, j.prompt_id].append(j)
    out = []
    for (policy, baseline, judge, prompt_id), members in groups.items():
        row = row_of[prompt_id]
        policy_texts, baseline_texts = responses.texts[policy][row], responses.texts[baseline][row]
        _check_samples(policy, baseline, len(policy_texts), len(baseline_texts))
        by_order: dict[int | None, list[float]] = defaultdict(list)
        for m in members:
            if m.preference is not None:
                by_order[m.order].append(m.preference)
        orders = {m.order for m in members}
        whole = by_order and by_order.keys() == orders  # a prompt that failed in one order is not judged
        mean = float(np.mean([np.mean(values) for values in by_order.values()])) if whole else None
        record: dict[str, Any] = {
            "instruction": readable(responses.prompts[row]),
            "output_1": baseline_texts[0],
            "generator_1": baseline,
            "dataset": "duel",
            "output_2": policy_texts[0],
            "generator_2": policy,
            "annotator": judge,
            "preference": None if mean is None else 1.0 + mean,
        }
        if orders in ({0}, {1}):
            record["swapped"] = orders == {0}  # the policy, output_2, stood first
        if mean is None:
            record["error"] = next((m.error for m in members if m.error), "")
        out.append(record)
    return out


def is_ours(path: Path) -> bool:
    """Whether a file is one that :func:`write_annotations` wrote."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = json.loads(raw)
    except (OSError, ValueError, EOFError, zlib.error, RecursionError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and row.get("dataset") == "duel" for row in rows)


def write_annotations(judgements: Sequence[Judgement], responses: PolicyResponses, path: Path) -> None:
    """Write :func:`annotation_rows` as ``.json`` or ``.json.gz``, whole or not at all."""
    text = json.dumps(annotation_rows(judgements, responses), indent=2)
    write_bytes(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
