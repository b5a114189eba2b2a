"""``duel score``: explicit rewards of preference data, one Parquet row per response."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.files import write_columns
from toolkit.measure.once import once
from toolkit.measure.options import ScoringOptions
from toolkit.measure.passes import StoredPass
from toolkit.measure.reading import DATA, EncodedRow, EncodedRows, Reading, ReadingOptions, Trees, read
from toolkit.measure.summary import summarise_rewards
from toolkit.models.encoding import Encoded, TextEncoder, text_encoder
from toolkit.models.load import reads_pairs
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import readable
from toolkit.progress import Reporter


@once()
def explicit_rewards(
    rm: str,
    data: str,
    reading_options: ReadingOptions,
    scoring: ScoringOptions,
    *,
    with_text: bool = False,
    out: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write the reward model's score of every response to ``out`` and return the summary. Interrupted, it continues.

    Each row of the table says where its response is in the data; ``with_text`` adds the texts.

    Raises ModelError for a model that is no reward model or gives no finite scores.
    """
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    ref = resolve(rm)
    reading = read(data, load_tokenizer(ref), rm, reading_options, pair=reads_pairs(ref))
    work = out.with_name(f".{out.name}.partial")
    scores = score_reading(rm, reading, reading_options.max_response_tokens, scoring, work, reporter)
    summary = summarise_rewards(reading, scores, [ref], started) | {"out": str(out)}
    write_columns(_columns(reading, scores, with_text).items(), out)
    shutil.rmtree(work, ignore_errors=True)
    return summary


def _columns(reading: Reading, scores: Sequence[NDArray[np.float64]], with_text: bool) -> dict[str, list[Any]]:
    """The table; its ``label`` is there where a pair has a winner."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for row, values in zip(reading.rows, scores, strict=True):
        for record in _records(row, values, with_text):
            for name, value in record.items():
                columns[name].append(value)
    if columns["label"][0] is None:
        labels = columns.pop("label")
        columns |= {"label": labels} if any(labels) else {}
    return columns


def _records(row: EncodedRow, scores: NDArray[np.float64], with_text: bool) -> list[dict[str, Any]]:
    """The table's rows of one prompt; ``label`` says something for a pair with a winner."""
    labels: Sequence[str | None] = row.labels or [None] * len(scores)
    return [
        {
            "prompt_id": row.row.prompt_id,
            "response_index": k,
            "n_tokens": len(ids),
            "explicit_reward": float(scores[k]),
            "truncated": row.encoded.truncated[k],
            "label": labels[k],
            "source_file": row.sources[k][0],
            "source_row": row.sources[k][1],
        }
        | ({"prompt": readable(row.row.prompt), "response": row.row.responses[k]} if with_text else {})
        for k, ids in enumerate(row.encoded.tree.response_ids)
    ]


def score_reading(
    rm: str, reading: Reading, max_response_tokens: int, scoring: ScoringOptions, work: Path, reporter: Reporter
) -> list[NDArray[np.float64]]:
    """[K] rewards of each row's responses, under a reward model with its own tokenizer and chat template."""
    ref = resolve(rm)
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, reading.rows[0].row.prompt, rm, pair=reads_pairs(ref))
    trees = Trees(EncodedRows.of(_read_by(encoder, row, max_response_tokens) for row in reading.rows))
    blocks = StoredPass(ref, "reward model", trees, tokenizer, work, scoring).scores(reporter)
    return [of_row for block in blocks for of_row in block]


def _read_by(encoder: TextEncoder, row: EncodedRow, max_response_tokens: int) -> EncodedRow:
    """The row in the ids of another tokenizer."""
    prompt, responses, cut = row.row.prompt, row.row.responses, row.encoded.truncated
    if row.origin == DATA:
        return replace(row, encoded=encoder.encode(prompt, responses, max_response_tokens))
    return replace(row, encoded=Encoded(encoder.as_sampled(prompt, responses, row.encoded.tree.response_ids, cut), cut))
