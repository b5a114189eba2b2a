"""What ``duel rewards`` and ``duel score`` compute on: preference data, and a run's samples, as token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.models.encoding import Encoded, TextEncoder, Tree, text_encoder
from toolkit.preferences import splits
from toolkit.preferences.reading import PreferenceData, read_preferences
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample, read_samples

SAMPLE_COLUMNS = ["prompt_id", "policy", "arm", "kind", "response", "response_ids", "truncated", "gold_reward"]
SAMPLE_SOURCES = {"base": "sft and base", "sft": "sft and base", "rm_ppo": "PPO", "dpo": "DPO"}  # as in a run's results


@dataclass(frozen=True)
class Reading:
    """Rows that fit the limits, as token ids, and what was left out. Behind the rows of the data may stand those of
    samples: ``sources[p]`` says whose row p is ("data", "PPO"), ``writers[p]`` which policy wrote each response."""

    encoder: TextEncoder
    rows: list[PreferenceRow]
    encoded: list[Encoded]
    counts: dict[str, int]
    data: PreferenceData
    sources: list[str]
    writers: list[list[str]]

    @property
    def n_data(self) -> int:
        """Rows of the data, which come first."""
        return self.sources.count("data")


def read(
    data: str,
    tokenizer: Any,
    spec: str,
    *,
    split: str,
    plain: bool,
    limit: int | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> Reading:
    """Read and tokenise. Prompts over the limit are left out, responses over it are cut; both are counted."""
    found = read_preferences(data, split=split, conversational=False if plain else None)
    rows = splits.limit(found.rows, limit, 0)
    encoder = text_encoder(tokenizer, rows[0].prompt, spec)
    kept, encoded = [], []
    for row in rows:
        item = encoder.encode(row.prompt, row.responses, max_response_tokens)
        if 0 < len(item.tree.prompt_ids) <= max_prompt_tokens:
            kept.append(row)
            encoded.append(item)
    if not kept:
        raise DataError("every prompt is longer than the limit", where=data, fix="raise --max-prompt-tokens")
    counts = {
        "n_long_prompts": len(rows) - len(kept),
        "n_truncated_responses": sum(sum(item.truncated) for item in encoded),
    }
    writers = [["data"] * len(row.responses) for row in kept]
    return Reading(encoder, kept, encoded, counts, found, ["data"] * len(kept), writers)


def with_samples(reading: Reading, path: Path) -> Reading:
    """The reading with a row for each source and prompt of a run's ``samples.parquet``: what SFT (with the base model),
    PPO and DPO wrote, checkpoints included, as the ids that were sampled. A prompt with one response is no pair.

    Raises DataError where the file has no such samples, none of the data's prompts, or ids of another tokenizer.
    """
    fix = "name the samples.parquet of a run, and as --data its data/eval.parquet"
    known = {row.prompt_id: (row, item) for row, item in zip(reading.rows, reading.encoded, strict=True)}
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in read_samples(path, SAMPLE_COLUMNS, fix=fix):
        # A best-of-n response is picked among others, not drawn.
        if sample.kind != "best_of_n" and sample.prompt_id in known:
            source = SAMPLE_SOURCES.get(sample.arm, sample.arm)
            groups.setdefault((source, sample.prompt_id), []).append(sample)
    groups = {key: found for key, found in groups.items() if len(found) > 1}
    if not groups:
        raise DataError("no prompt of the data has two samples of one source", where=str(path), fix=fix)
    rows, encoded = list(reading.rows), list(reading.encoded)
    sources, writers = list(reading.sources), list(reading.writers)
    for (source, prompt_id), found in sorted(groups.items()):
        row, item = known[prompt_id]
        ids = [sample.response_ids for sample in found]
        if reading.encoder.decode(ids[0]) != found[0].response:
            raise DataError("the samples are ids of another tokenizer", where=f"{path}, prompt {prompt_id}", fix=fix)
        gold = [sample.gold_reward for sample in found]
        rows.append(
            replace(
                row,
                responses=[sample.response for sample in found],
                comparisons=[],
                gold=[value for value in gold if value is not None] if None not in gold else None,
            )
        )
        encoded.append(Encoded(Tree(item.tree.prompt_ids, ids), [sample.truncated for sample in found]))
        sources.append(source)
        writers.append([sample.policy for sample in found])
    return replace(reading, rows=rows, encoded=encoded, sources=sources, writers=writers)


def pairwise_label(row: PreferenceRow) -> list[str] | None:
    """``chosen`` and ``rejected`` for a pair with a winner."""
    found = splits.pairs(row)
    if len(row.responses) != 2 or len(found) != 1 or found[0].p == 0.5:
        return None
    return ["chosen", "rejected"] if found[0].p > 0.5 else ["rejected", "chosen"]
