"""What ``duel rewards`` and ``duel score`` compute on: preference data, and a run's samples, as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError
from toolkit.evals.agreement import Comparison
from toolkit.measure.responses import say_left_out
from toolkit.measure.single_responses import read_single_responses
from toolkit.models.encoding import Encoded, TextEncoder, Tree, text_encoder
from toolkit.models.prompt_kind import trained_on_messages
from toolkit.models.rendering import refusals_at
from toolkit.models.resolve import resolve
from toolkit.preferences import splits
from toolkit.preferences.loading import place_in
from toolkit.preferences.reading import DataReport, PreferenceData, read_preferences
from toolkit.preferences.rows import Comparison as Judged
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample, SampleTable, table_samples
from toolkit.progress import Reporter
from toolkit.storage.lazy import Computed, LazySequence
from toolkit.storage.spilled import Spill

SAMPLE_COLUMNS = ["prompt_id", "policy", "arm", "kind", "response", "response_ids", "truncated", "gold_reward"]
# Whose samples are compared together, by arm; the names are those of a run's results.
SAMPLE_ORIGINS = {"base": "sft and base", "sft": "sft and base", "rm_ppo": "PPO", "dpo": "DPO"}
DATA = "data"
UNENDED = "data, without an end"


@dataclass(frozen=True)
class ReadingOptions:
    """Which rows of the data are read, and how long their texts may be, in tokens.

    ``plain`` reads "Human: ... Assistant: ..." transcripts as text, for models without a chat template. Without it a
    model of duel gets prompts of the kind that it was trained on, where that can be.
    """

    split: str = "train"  # of a data set on the hub
    limit: int | None = None
    plain: bool = False
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 1024


@dataclass(frozen=True)
class EncodedRow:
    """A prompt with responses, as text and as token ids.

    ``origin`` is ``DATA`` for the data's responses, ``UNENDED`` where their ends were taken away, or says whose samples
    they are ("PPO"). ``writers[k]`` is the policy
    that wrote response k, or "data"; ``sources[k]`` the file and the row where it is.
    """

    row: PreferenceRow
    encoded: Encoded
    origin: str
    writers: list[str]
    sources: list[tuple[str, int]] = field(default_factory=list)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """[K] tokens of each response."""
        return np.array([len(ids) for ids in self.encoded.tree.response_ids], dtype=np.float64)

    @property
    def labels(self) -> list[str] | None:
        """``chosen`` and ``rejected`` for a pair with a winner."""
        pairs = splits.pairs(self.row)
        if len(self.row.responses) != 2 or len(pairs) != 1 or pairs[0].p == 0.5:
            return None
        return ["chosen", "rejected"] if pairs[0].p > 0.5 else ["rejected", "chosen"]


@dataclass(frozen=True)
class EncodedRows(LazySequence[EncodedRow]):
    """Rows that wait on disk, in this order of their places there."""

    stored: Spill
    order: Sequence[int]

    @classmethod
    def of(cls, rows: Iterable[EncodedRow]) -> EncodedRows:
        stored = Spill()
        return cls(stored, array("q", [store(row, stored) for row in rows]))

    def __len__(self) -> int:
        return len(self.order)

    def item(self, at: int) -> EncodedRow:
        fields, tree, truncated, origin, writers, sources = self.stored[self.order[at]]
        prompt_id, prompt, responses, comparisons, gold, source_row, group = fields
        judged = list(map(Judged._make, comparisons))
        row = PreferenceRow(prompt_id, prompt, responses, judged, gold, source_row, group)
        encoded = Encoded(Tree(*tree), truncated)
        return EncodedRow(row, encoded, origin, writers, [(file, number) for file, number in sources])


def store(row: EncodedRow, stored: Spill) -> int:
    """Add a row to those on disk; returns its place."""
    of, tree = row.row, row.encoded.tree
    fields = (of.prompt_id, of.prompt, of.responses, of.comparisons, of.gold, of.source_row, of.group)
    ids = (tree.prompt_ids, tree.response_ids)
    return stored.append((fields, ids, row.encoded.truncated, row.origin, row.writers, row.sources))


@dataclass(frozen=True)
class Reading:
    """Rows that fit the limits, the data's first and then those of samples; and counts of what was left out or cut."""

    encoder: TextEncoder
    rows: Sequence[EncodedRow]
    counts: dict[str, int]

    @cached_property
    def n_data(self) -> int:
        """How many rows the data has."""
        return sum(row.origin == DATA for row in self.rows)

    @property
    def trees(self) -> Sequence[Tree]:
        return Computed(self.rows, lambda row: row.encoded.tree)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """(row, i, j, p, weight) of every compared pair of responses."""
        return [
            (p, pair.i, pair.j, pair.p, pair.weight)
            for p, row in enumerate(self.rows)
            for pair in splits.pairs(row.row)
        ]


def read_data(
    data: str,
    options: ReadingOptions,
    reporter: Reporter | None = None,
    *,
    trained: bool | None = None,
    singles: bool = False,
    compared: bool = False,
) -> PreferenceData:
    """The data as text, all of it; with ``singles`` also rows of one response, ``compared`` as :func:`read` has it.

    A model that was ``trained`` on messages gets text prompts as messages, and one that was trained on text gets
    transcripts as text. Raises DataError where the data cannot be read.
    """

    def rows(conversational: bool | None) -> PreferenceData:
        found = None
        if singles:
            found = read_single_responses(data, options.split, conversational=conversational, compared=compared)
        return found or read_preferences(data, split=options.split, conversational=conversational)

    preferences = rows(False if options.plain else trained or None)
    if trained is False and preferences.report.conversational and preferences.report.format.endswith("transcripts"):
        preferences = rows(False)
    say_left_out(data, preferences.report, reporter)
    return preferences


def read(
    data: str,
    tokenizer: Any,
    spec: str,
    options: ReadingOptions,
    *,
    pair: bool = False,
    compared: bool = False,
    reporter: Reporter | None = None,
) -> Reading:
    """Read and tokenise preference data, or responses without preferences.

    Prompts over the limit are left out, responses over it are cut; both are counted. ``options.limit`` counts the
    prompts that are not left out. ``pair``: as an encoder reads them. ``compared``: without the responses that nothing
    is compared with. The reporter says which rows of the data are left out.

    Raises DataError where no prompt is left.
    """
    trained = trained_on_messages(resolve(spec))
    preferences = read_data(data, options, reporter, trained=trained, singles=True, compared=compared)
    encoder = text_encoder(tokenizer, preferences.rows[0].prompt, spec, pair=pair)
    stored, at = Spill(), dict[int, int]()  # place of a row in the data -> among those that are stored
    n_long = n_truncated = 0
    for place in splits.limit_order(preferences.rows, options.limit, 0):
        if len(at) == options.limit:
            break
        row = preferences.rows[place]
        with refusals_at(place_in(data, row.source_row)):
            encoded = encoder.encode(row.prompt, row.responses, options.max_response_tokens)
        if not 0 < len(encoded.tree.prompt_ids) <= options.max_prompt_tokens:
            n_long += 1
            continue
        n_truncated += sum(encoded.truncated)
        sources = [(data, number) for number in preferences.rows.response_rows(place)]
        at[place] = store(EncodedRow(row, encoded, DATA, [DATA] * len(row.responses), sources), stored)
    if not at:
        raise DataError("every prompt is longer than the limit", where=data, fix="raise --max-prompt-tokens")
    rows = EncodedRows(stored, array("q", [at[place] for place in sorted(at)]))
    return Reading(encoder, rows, reading_counts(preferences.report, n_long, n_truncated))


def reading_counts(report: DataReport, n_long_prompts: int = 0, n_truncated_responses: int = 0) -> dict[str, int]:
    """What was left out or cut: rows by the reader of the data, prompts and responses by the limits."""
    return {
        "n_rows_left_out": report.n_rows_left_out,
        "n_long_prompts": n_long_prompts,
        "n_truncated_responses": n_truncated_responses,
    }


def with_samples(reading: Reading, path: Path) -> Reading:
    """The reading with further rows: what SFT (with the base model), PPO and DPO of a run wrote to the data's prompts.

    ``path`` is the run's ``samples.parquet``. The samples of checkpoints count, as the ids that were sampled. Prompts
    with a single response of an origin are left out: they have no pair.

    Raises DataError where the file has no such samples, none of the data's prompts, or ids of another tokenizer.
    """
    fix = "name the samples.parquet of a run, and as --data its data/eval.parquet"
    known = {row.row.prompt_id: place for place, row in enumerate(reading.rows)}
    samples = SampleTable(table_samples(path, SAMPLE_COLUMNS, fix=fix))
    groups: dict[tuple[str, str], array[int]] = {}  # the places of the samples of an origin to a prompt
    for place, sample in enumerate(samples):
        # A best-of-n response is picked among others, not drawn.
        if sample.kind != "best_of_n" and sample.prompt_id in known:
            origin = SAMPLE_ORIGINS.get(sample.arm, sample.arm)
            groups.setdefault((origin, sample.prompt_id), array("q")).append(place)
    groups = {key: places for key, places in groups.items() if len(places) > 1}
    if not groups:
        raise DataError("no prompt of the data has two samples of one source", where=str(path), fix=fix)

    def sampled() -> Iterator[EncodedRow]:
        for (origin, prompt_id), places in sorted(groups.items(), key=lambda group: group[0]):
            of_prompt = [samples[place] for place in places]
            if reading.encoder.decode(of_prompt[0].response_ids) != of_prompt[0].response:
                where = f"{path}, prompt {prompt_id}"
                raise DataError("the samples are ids of another tokenizer", where=where, fix=fix)
            sources = [(str(path), place + 1) for place in places]
            yield _sampled_row(reading.rows[known[prompt_id]], origin, of_prompt, sources)

    return replace(reading, rows=EncodedRows.of(chain(reading.rows, sampled())))


def _sampled_row(
    of_data: EncodedRow, origin: str, samples: Sequence[Sample], sources: list[tuple[str, int]]
) -> EncodedRow:
    gold = [sample.gold_reward for sample in samples]
    row = replace(
        of_data.row,
        responses=[sample.response for sample in samples],
        comparisons=[],
        gold=[value for value in gold if value is not None] if None not in gold else None,
    )
    tree = Tree(of_data.encoded.tree.prompt_ids, [sample.response_ids for sample in samples])
    encoded = Encoded(tree, [sample.truncated for sample in samples])
    return EncodedRow(row, encoded, origin, [sample.policy for sample in samples], sources)
