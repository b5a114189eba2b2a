"""``duel score``: explicit rewards of preference data, one Parquet row per response."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.files import write_tables
from toolkit.measure.once import once
from toolkit.measure.options import ScoringOptions
from toolkit.measure.passes import StoredPass
from toolkit.measure.reading import DATA, UNENDED, EncodedRow, Reading, ReadingOptions, read
from toolkit.measure.summary import check_finite, summarise_rewards
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.load import reads_pairs
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.stored import StoredTrees
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import readable
from toolkit.preferences.views import chunks
from toolkit.progress import Reporter

PROMPTS_AT_ONCE = 256  # whose rows of the table are made together
ROW_GROUP = 1 << 20
# The columns of the table; some are there only with their option, or for one kind of data.
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_index", pa.int64()),
        ("n_tokens", pa.int64()),
        ("explicit_reward", pa.float64()),
        ("truncated", pa.bool_()),
        ("label", pa.string()),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
    ]
)


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
    tokenizer = load_tokenizer(ref)
    reading = read(data, tokenizer, rm, reading_options, pair=reads_pairs(ref), reporter=reporter)
    work = out.with_name(f".{out.name}.partial")
    scores = _scores(ref, reading.trees, tokenizer, scoring, work, reporter)
    summary = summarise_rewards(reading, scores, [ref], started) | {"out": str(out)}
    schema = _schema(reading, with_text)
    write_tables(_tables(reading, scores, schema), schema, out, ROW_GROUP)
    shutil.rmtree(work, ignore_errors=True)
    return summary


def _schema(reading: Reading, with_text: bool) -> pa.Schema:
    """The columns that this call writes; ``label`` where a pair has a winner, at the end where the first has none."""
    names = [name for name in SCHEMA.names if with_text or name not in ("prompt", "response")]
    if reading.rows[0].labels is None:
        names.remove("label")
        names += ["label"] if any(row.labels for row in reading.rows) else []
    return pa.schema([SCHEMA.field(name) for name in names])


def _tables(reading: Reading, scores: Sequence[NDArray[np.float64]], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of the table, those of some prompts at once."""
    for part in chunks(zip(reading.rows, scores, strict=True), PROMPTS_AT_ONCE):
        records = [record for row, values in part for record in _records(row, values)]
        yield pa.Table.from_pylist(records, schema=schema)


def _records(row: EncodedRow, scores: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The table's rows of one prompt, in all columns; ``label`` says something for a pair with a winner."""
    labels: Sequence[str | None] = row.labels or [None] * len(scores)
    prompt = readable(row.row.prompt)
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
            "prompt": prompt,
            "response": row.row.responses[k],
        }
        for k, ids in enumerate(row.encoded.tree.response_ids)
    ]


def score_reading(
    rm: str, reading: Reading, max_response_tokens: int, scoring: ScoringOptions, work: Path, reporter: Reporter
) -> list[NDArray[np.float64]]:
    """[K] rewards of each row's responses, under a reward model with its own tokenizer and chat template."""
    ref = resolve(rm)
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, reading.rows[0].row.prompt, rm, pair=reads_pairs(ref))
    trees = StoredTrees(_read_by(encoder, row, max_response_tokens) for row in reading.rows)
    return _scores(ref, trees, tokenizer, scoring, work, reporter)


def _scores(
    ref: ModelRef, trees: Sequence[Tree], tokenizer: Any, scoring: ScoringOptions, work: Path, reporter: Reporter
) -> list[NDArray[np.float64]]:
    """[K] rewards of each tree's responses, whose ids are the reward model's own.

    Raises ModelError for one that is not finite.
    """
    blocks = StoredPass(ref, "reward model", trees, tokenizer, work, scoring).scores(reporter)
    rewards = [of_row for block in blocks for of_row in block]
    check_finite(rewards, ref.spec)
    return rewards


def _read_by(encoder: TextEncoder, row: EncodedRow, max_response_tokens: int) -> Tree:
    """The row in the ids of another tokenizer."""
    prompt, responses, cut = row.row.prompt, row.row.responses, row.encoded.truncated
    if row.origin == DATA:
        return encoder.encode(prompt, responses, max_response_tokens).tree
    if row.origin == UNENDED:
        return encoder.encode_samples(prompt, responses, cut, max_response_tokens)
    return encoder.as_sampled(prompt, responses, row.encoded.tree.response_ids, cut)
